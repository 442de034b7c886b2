// Deployed models: a live table, and a page for each.
import { html, useEffect, useState } from "./vendor/preact.js";
import { FINISHED, follow, get, post, request } from "./api.js";
import { Chart, Figures, Problem, State, bytes, moment, png, seconds, size } from "./parts.js";

export function Models({ live }) {
  if (!live.models.length) {
    return html`<h1>Models</h1>
      <p>${live.status ? "No model yet." : "Asking …"} <a href="#budgets">Choose a budget</a> to make one.</p>`;
  }
  return html`
    <h1>Models</h1>
    <div class="overflow-auto" tabindex="0" role="region" aria-label="Models">
      <table class="striped">
        <thead><tr>
          <th scope="col">name</th><th scope="col">state</th><th scope="col">size</th>
          <th scope="col">memory, predicted · measured</th><th scope="col">latency, predicted · measured</th>
          <th scope="col">revision</th><th scope="col">images made</th>
        </tr></thead>
        <tbody>${live.models.map((model) => html`<tr key=${model.id}>
          <th scope="row"><a href=${`#models/${model.id}`}>${model.name}</a></th>
          <td><${State} of=${model.status} /></td>
          <td>${size(model.plan)}</td>
          <td>${bytes(model.plan.predicted.memory_bytes)} · ${bytes(model.measured?.memory_bytes)}</td>
          <td>${seconds(model.plan.predicted.latency_p95_seconds)} · ${seconds(model.measured?.latency_p95_seconds)}</td>
          <td>${model.revision ?? "–"}</td>
          <td>${live.images[model.id] ?? 0}</td>
        </tr>`)}</tbody>
      </table>
    </div>`;
}

export function Model({ id, live }) {
  const [model, setModel] = useState(null);
  const [events, setEvents] = useState([]);
  const [problem, setProblem] = useState(null);
  const [images, setImages] = useState(null);
  const changed = JSON.stringify(live.models.find((other) => other.id === id));

  useEffect(() => {
    get(`models/${id}`).then(setModel, setProblem);
  }, [changed]);
  useEffect(() => {
    const heard = (name) => (data, event) => {
      const at = Number(event.lastEventId.split("-")[0]);
      setEvents((before) => [...before, { name, data, at }]);
      if (name === "status" && FINISHED.has(data.status)) stop();
    };
    const names = ["status", "progress", "verified", "refined", "replanned"];
    const stop = follow(`models/${id}/events`, Object.fromEntries(names.map((n) => [n, heard(n)])));
    return stop;
  }, []);

  async function attempt(work) {
    setProblem(null);
    try {
      await work();
    } catch (error) {
      setProblem(error);
    }
  }
  const sample = () =>
    attempt(async () => {
      setImages("busy");
      setImages((await post("generate", { model: id, seed: 1 })).images);
    });
  const stopRefining = () => attempt(async () => setModel(await post(`models/${id}/cancel`, {})));
  const goOn = () => attempt(async () => setModel(await post(`models/${id}/continue`, {})));
  const remove = () =>
    confirm(`Delete ${model.name}? Its images stay until they expire.`) &&
    attempt(async () => {
      await request("DELETE", `models/${id}`);
      location.hash = "#models";
    });

  if (!model) return html`<h1>Model</h1><${Problem} of=${problem} />`;
  const losses = events.filter((e) => e.name === "progress" && e.data.heldout_loss !== null);
  const refining = losses.filter((e) => e.data.status === "refining");
  const curl = `curl -s ${location.origin}/generate -H 'content-type: application/json' \\
     -H 'accept: image/png' -d '{"model": "${id}"}' -o images.png`;
  return html`
    <p><a href="#models">All models</a></p>
    <h1>${model.name}</h1>
    <p><${State} of=${model.status} /> ${model.error && html`<span>${model.error}</span>`}</p>
    <${Problem} of=${problem} />
    <${Figures} of=${{
      size: size(model.plan),
      mode: `${model.plan.mode}, ${model.plan.dtype}`,
      revision: model.revision ?? "–",
      "images made": live.images[id] ?? 0,
      "memory, predicted": bytes(model.plan.predicted.memory_bytes),
      "memory, measured": bytes(model.measured?.memory_bytes),
      "latency, predicted": seconds(model.plan.predicted.latency_p95_seconds),
      "latency, measured": seconds(model.measured?.latency_p95_seconds),
      training: trained(model.training),
    }} />
    ${model.plan.latency_estimated && html`<p class="quiet">Latency was estimated: this device had
      not been measured idle yet.</p>`}
    ${model.measured && model.disturbed && html`<p class="quiet">Measured latency is not to be
      relied on: ${model.disturbed}.</p>`}
    <div class="row">
      <button onClick=${sample} disabled=${model.revision === null || images === "busy"}
        aria-busy=${images === "busy"}>Sample every class</button>
      <a role="button" class="secondary outline" href=${model.revision === null ? undefined : `models/${id}/export`}
        aria-disabled=${model.revision === null} download>Export for diffusers</a>
      ${model.status === "refining" && html`<button class="secondary outline" onClick=${stopRefining}
        disabled=${model.refine.stopped}>Stop refining, keep the best</button>`}
      ${model.status === "undertrained" && html`<button onClick=${goOn}>Train on</button>`}
      <button class="secondary outline" onClick=${remove}>Delete</button>
    </div>
    ${Array.isArray(images) && html`<p class="images">${images.map(
      (image) => html`<img src=${png(image.b64_png)} alt=${`class ${image.class_label}`} />`,
    )}</p>`}
    <div class="columns">
      <section>
        <h2>Retraining Σ</h2>
        <${Losses} of=${losses.filter((e) => !refining.includes(e))} />
        ${model.refine && html`<h2>Refining every weight</h2><${Losses} of=${refining} />`}
      </section>
      <section>
        <h2>What happened</h2>
        <ol class="timeline">${milestones(events).map(
          (e) => html`<li><span class="quiet">${moment(e.at)}</span> ${told(e)}</li>`)}</ol>
      </section>
    </div>
    <h2>From a shell</h2>
    <pre tabindex="0"><code>${curl}</code></pre>`;
}

function trained(training) {
  if (!training) return "–";
  if (training.stopped === "prepared") return "prepared in the family";
  const { steps, most_steps, stopped } = training;
  return `${steps} of ${most_steps} steps${stopped === "steps" ? "" : `: ${stopped}`}`;
}

function Losses({ of }) {
  if (!of.length) return html`<p class="quiet">No loss measured yet.</p>`;
  const values = of.map((e) => e.data.heldout_loss);
  return html`<${Chart}
    label=${`Held-out loss from ${values[0]} to ${values.at(-1)}`}
    x=${{ title: "step", format: String }}
    y=${{ title: "held-out loss", format: (v) => v.toPrecision(4) }}
    series=${[{ label: "held-out loss", line: true }]}
    data=${[of.map((e) => e.data.step), values]} />`;
}

// Events but progress, and but those that repeat the one before.
function milestones(events) {
  const same = (a, b) => ["status", "revision", "error"].every((key) => a.data[key] === b.data[key]);
  const told = events.filter((e) => e.name !== "progress");
  return told.filter((e, i) => !(i && e.name === "status" && told[i - 1].name === "status" && same(e, told[i - 1])));
}

function told({ name, data }) {
  if (name === "status") {
    const revision = data.revision === null ? "" : `, revision ${data.revision} served`;
    return html`<${State} of=${data.status} />${revision}${data.error ? `: ${data.error}` : ""}`;
  }
  if (name === "verified") {
    const { memory_bytes: held, latency_p95_seconds: took } = data.measured;
    const verdict = data.over_budget.length ? `over ${data.over_budget.join(" and ")}` : "budget kept";
    return `measured ${bytes(held)}, ${seconds(took)}: ${verdict}`;
  }
  if (name === "refined" && data.error) return `not refined: ${data.error}`;
  if (name === "refined") {
    const [before, after] = [data.heldout_loss_before, data.heldout_loss].map((v) => v.toPrecision(4));
    return `refined for ${seconds(data.seconds)}: held-out loss ${before} → ${after}`;
  }
  return `planned anew: ${size(data.plan)}, because ${data.reason}`;
}
