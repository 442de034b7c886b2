// Deployed models: a live table, and a page for each.
import { html, useEffect, useState } from "./vendor/preact.js";
import { FINISHED, follow, get, post, request } from "./api.js";
import { BUDGETS, Chart, Copy, Figures, Picture, Problem, State, Word, ago, bytes, latency, latencyName, moment, png, seconds, size, title } from "./parts.js";

const FORMATS = {
  diffusers: ["for diffusers", "a pipeline that plain diffusers loads"],
  onnx: ["for ONNX", "the network for ONNX runtimes; about two minutes"],
  native: ["for learngenes", "U, V, Σ and the stem: samples without a server"],
  adapter: ["an adapter", "what is the model's own, without the family"],
};

// Measured beside predicted, and a mark where they disagree by more than a tenth.
export function Measured({ predicted, measured, format }) {
  if (measured === null || measured === undefined) return html`${format(predicted)} <span class="quiet">predicted</span>`;
  const off = measured / predicted - 1;
  const mark = Math.abs(off) > 0.1;
  return html`${format(measured)} <span class=${mark ? "off" : "quiet"} title=${`predicted: ${format(predicted)}`}>
    ${mark ? `${Math.round(100 * Math.abs(off))} % ${off > 0 ? "over" : "under"} predicted` : "as predicted"}</span>`;
}

// A model's latency, at the percentile that its budget is for.
function Latency({ of: { plan, measured, budget, disturbed } }) {
  const at = (cost) => cost && latency(cost, budget.latency_percentile);
  if (measured && disturbed) return html`${seconds(at(measured))} <span class="quiet" title=${disturbed}>disturbed</span>`;
  return html`<${Measured} predicted=${at(plan.predicted)} measured=${at(measured)} format=${seconds} />`;
}

// The family's sample of a model's size, or the first image of the task that it was made for.
function Thumbnail({ model, family, tasks }) {
  if (family && !model.class_names) return html`<${Picture} family=${family} plan=${model.plan} pixels=${72} alt="" />`;
  if (!tasks.includes(model.task)) return html`<span class="picture none"></span>`;
  const rows = Math.min(20, model.class_names.length); // of its preview, one for each class
  const style = { backgroundImage: `url(tasks/${model.task}/preview.png)`, backgroundSize: `auto ${100 * rows}%` };
  return html`<span class="picture none" style=${style} role="img" aria-label=${`${model.class_names[0]}, an image of its task`}></span>`;
}

export function Models({ live, families }) {
  const [wanted, setWanted] = useState("");
  const [tasks, setTasks] = useState([]);
  useEffect(() => {
    get("tasks").then((answer) => setTasks(answer.tasks.map(({ id }) => id)), () => {}); // they are only pictures
  }, []);
  if (!live.models.length) {
    return html`<h1>Models</h1>
      <p>${live.status ? "No model yet." : "Asking …"} <a href="#budgets">Choose a budget</a> to make one.</p>`;
  }
  const text = (model) => [model.name, model.id, title(model), model.status, size(model.plan)].join(" ").toLowerCase();
  const shown = live.models.filter((model) => wanted.toLowerCase().split(" ").every((word) => text(model).includes(word)));
  return html`
    <h1>Models</h1>
    <input type="search" aria-label="Filter" placeholder="Filter: ready fashion float32 …" value=${wanted} onInput=${(event) => setWanted(event.target.value)} />
    ${!shown.length && html`<p class="quiet">No model is like that.</p>`}
    <ul class="list">${shown.map((model) => {
      const family = families.find((other) => other.name === model.family);
      return html`<li key=${model.id} class="item" aria-label=${model.name}>
        <${Thumbnail} model=${model} family=${family} tasks=${tasks} />
        <div class="name"><a href=${`#models/${model.id}`}>${title(model)}</a>
          <span class="quiet">${model.name.includes(model.id) ? "" : `${model.name} · `}<code>${model.id}</code></span>
          <span class="quiet">${size(model.plan)}${model.class_names ? `, ${model.class_names.length} classes of its own` : ""} · ${ago(model.created_at)}</span></div>
        <div><${State} of=${model.status} /></div>
        <div><small class="quiet">memory</small><br /><${Measured} predicted=${model.plan.predicted.memory_bytes} measured=${model.measured?.memory_bytes} format=${bytes} /></div>
        <div><small class="quiet">${latencyName(model.budget.latency_percentile)}</small><br /><${Latency} of=${model} /></div>
        <div><small class="quiet">images</small><br />${live.images[model.id] ?? 0}</div>
      </li>`;
    })}</ul>`;
}

// The way of a model: what is done, what is under way, what comes, and what each takes.
const STAGES = [
  ["queued", "Queued", "until a build worker is free"],
  ["usable", "Usable", "assembled: revision 0 is served already"],
  ["retrained", "Retrained", "its Σ, on images of its classes: about a minute, or prepared"],
  ["refined", "Refined", "every weight, for as long as you asked"],
  ["measured", "Measured", "memory and latency, against the budget"],
  ["ready", "Ready", ""],
];
const OF_A_TASK = ["usable", "Assembled", "its classes are served once they are learned"];
const AT = { queued: 0, assembling: 1, retraining: 2, refining: 3, verifying: 4, ready: 6, undertrained: 6 };

function Stepper({ model, progress, queue }) {
  const ended = ["failed", "cancelled", "deleted"].includes(model.status);
  const stages = STAGES.filter(([name]) => name !== "refined" || model.refine).map((stage) => (stage[0] === "usable" && model.class_names ? OF_A_TASK : stage));
  const at = ended ? -1 : stages.findIndex(([name]) => name === STAGES[AT[model.status]]?.[0]);
  const current = ended ? -1 : at < 0 ? stages.length : at;
  const part = progress && progress.status === model.status ? progress : null;
  return html`<ol class="stepper" aria-label="Progress of the build">${stages.map(([name, label, takes], i) => {
    const state = i < current || (name === "usable" && model.revision !== null) ? "done" : i === current ? "now" : "next";
    return html`<li class=${state} aria-current=${state === "now" ? "step" : undefined}>
      <strong>${label}</strong>
      <small>${state === "now" && part ? `step ${part.step} of ${part.steps}` : state === "now" && name === "queued" && queue > 0 ? `${queue} waiting, about ${Math.max(1, queue)} min` : takes}</small>
      ${state === "now" && part && html`<progress value=${part.step} max=${part.steps} aria-label=${label}></progress>`}
    </li>`;
  })}</ol>`;
}

// The same request in the languages that people ask from.
function Snippets({ id }) {
  const origin = location.origin + location.pathname.replace(/\/$/, "");
  const texts = {
    curl: `curl -s ${origin}/generate -H 'content-type: application/json' \\\n     -H 'accept: image/png' -d '{"model": "${id}"}' -o images.png`,
    Python: `from fineserve.client import Client\n\nwith Client("${origin}") as client:\n    for image in client.generate("${id}", n=4):\n        open(f"{image.seed}.png", "wb").write(image.png)`,
    OpenAI: `from openai import OpenAI\n\nclient = OpenAI(base_url="${origin}/v1", api_key="-")\nanswer = client.images.generate(model="${id}", prompt="", n=4)\nprint(answer.data[0].b64_json[:20])`,
    diffusers: `fineserve models export ${id} model\npython -c 'from diffusers import DiTPipeline; DiTPipeline.from_pretrained("model")'`,
  };
  const [shown, setShown] = useState("curl");
  return html`<section aria-label="From your program">
    <h2>From your program</h2>
    <div class="row tight languages">${Object.keys(texts).map((name) => html`<button type="button" class="small" aria-pressed=${name === shown} onClick=${() => setShown(name)}>${name}</button>`)}
      <${Copy} text=${texts[shown]} /></div>
    <pre tabindex="0"><code>${texts[shown]}</code></pre>
  </section>`;
}

export function Model({ id, live, families }) {
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
  const cancel = () => attempt(async () => setModel(await post(`models/${id}/cancel`, {})));
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
  const progress = events.filter((e) => e.name === "progress").at(-1)?.data;
  const building = !FINISHED.has(model.status);
  const lost = ["failed", "cancelled"].includes(model.status);
  const { predicted } = model.plan;
  const names = model.class_names ?? families.find((f) => f.name === model.family)?.class_names ?? [];
  return html`
    <p><a href="#models">All models</a></p>
    <h1>${title(model)}</h1>
    <p><${State} of=${model.status} /> <span class="quiet">${model.name.includes(model.id) ? "" : `${model.name} · `}<code>${id}</code></span> <${Copy} text=${id} /> ${model.error && html`<span>${model.error}</span>`}</p>
    <${Problem} of=${problem} />
    <${Stepper} model=${model} progress=${progress} queue=${live.status?.queues.build ?? 0} />
    <div class="row">
      <button onClick=${sample} disabled=${model.revision === null || images === "busy"}
        aria-busy=${images === "busy"}>${building && model.revision !== null ? "Try it now: sample every class" : "Sample every class"}</button>
      ${model.revision !== null && html`<a role="button" class="secondary outline" href=${`#playground/model=${id}`}>Open in the playground</a>`}
      ${model.status === "refining" && html`<button class="secondary outline" onClick=${stopRefining}
        disabled=${model.refine.stopped}>Stop refining, keep the best</button>`}
      ${building && model.status !== "refining" && html`<button class="secondary outline" onClick=${cancel}>Cancel</button>`}
      ${model.status === "undertrained" && html`<button onClick=${goOn}>Train on</button>`}
      <button class="secondary outline" onClick=${remove}>Delete</button>
    </div>
    ${Array.isArray(images) && html`<div class="images">${images.map((image) => html`<figure>
      <img src=${png(image.b64_png)} alt=${names[image.class_label] ?? `class ${image.class_label}`} />
      <figcaption>${names[image.class_label] ?? image.class_label}</figcaption></figure>`)}</div>`}
    <${Figures} of=${{
      size: size(model.plan),
      mode: `${model.plan.mode}, ${model.plan.dtype}`,
      revision: model.revision ?? "–",
      "images made": live.images[id] ?? 0,
      memory: html`<${Measured} predicted=${predicted.memory_bytes} measured=${model.measured?.memory_bytes} format=${bytes} />`,
      [latencyName(model.budget.latency_percentile)]: html`<${Latency} of=${model} />`,
      training: trained(model.training),
    }} />
    ${model.plan.latency_estimated && html`<p class="quiet">Latency was estimated: this device had
      not been measured idle yet.</p>`}
    ${model.measured && model.disturbed && html`<p class="quiet">Measured latency is not to be
      relied on: ${model.disturbed}.</p>`}
    <div class="columns">
      <section>
        <h2>Retraining <${Word} of="Σ" /></h2>
        <${Losses} of=${losses.filter((e) => !refining.includes(e))} training=${model.training} />
        ${model.refine && html`<h2>Refining every weight</h2><${Losses} of=${refining} />`}
      </section>
      <section>
        <h2>What happened</h2>
        <ol class="timeline">${milestones(events).map(
          (e) => html`<li><span class="quiet">${moment(e.at)}</span> ${told(e, model.budget)}</li>`)}</ol>
      </section>
    </div>
    ${!lost && html`<${Snippets} id=${id} />
    <section aria-label="Export">
      <h2>Take it with you</h2>
      ${model.status !== "ready" && html`<p class="quiet">Exports come once it is ready.</p>`}
      <ul class="exports">${Object.entries(FORMATS).map(([format, [name, words]]) => html`<li>
        <a role="button" class="secondary outline" href=${model.status === "ready" ? `models/${id}/export?format=${format}` : undefined}
          aria-disabled=${model.status !== "ready"} download>Export ${name}</a> <span class="quiet">${words}</span></li>`)}</ul>
    </section>`}`;
}

function trained(training) {
  if (!training) return "–";
  if (training.stopped === "prepared") return "prepared in the family";
  if (training.stopped === "random") return "none: random weights";
  const { steps, most_steps, stopped } = training;
  return `${steps} of ${most_steps} steps${stopped === "steps" ? "" : `: ${stopped}`}`;
}

// Held-out loss by step, from before the first one.
function Losses({ of, training }) {
  if (!of.length) {
    const prepared = training?.stopped === "prepared";
    return html`<p class="quiet">${prepared ? "Nothing to train: the family has this size's prepared." : "No loss measured yet."}</p>`;
  }
  const before = training?.heldout_loss_before;
  const start = before ? [[0, before]] : [];
  const points = [...start, ...of.map((e) => [e.data.step, e.data.heldout_loss])];
  const values = points.map(([, loss]) => loss);
  return html`<${Chart}
    label=${`Held-out loss from ${values[0]} to ${values.at(-1)}`}
    x=${{ title: "step", format: String }}
    y=${{ title: "held-out loss", format: (v) => v.toPrecision(4) }}
    series=${[{ label: "held-out loss", line: true }]}
    data=${[points.map(([step]) => step), values]} />`;
}

// Events but progress, and but those that repeat the one before.
function milestones(events) {
  const same = (a, b) => ["status", "revision", "error"].every((key) => a.data[key] === b.data[key]);
  const told = events.filter((e) => e.name !== "progress");
  return told.filter((e, i) => !(i && e.name === "status" && told[i - 1].name === "status" && same(e, told[i - 1])));
}

function told({ name, data }, budget) {
  if (name === "status") {
    const revision = data.revision === null ? "" : `, revision ${data.revision} served`;
    return html`<${State} of=${data.status} />${revision}${data.error ? `: ${data.error}` : ""}`;
  }
  if (name === "verified") {
    const [held, took] = [data.measured.memory_bytes, latency(data.measured, budget.latency_percentile)];
    const over = data.over_budget.map((name) => BUDGETS[name]).join(" and ");
    const verdict = over ? `over the budget of ${over}` : data.disturbed ? "budget kept, but latency was disturbed" : "budget kept";
    return `measured ${bytes(held)}, ${seconds(took)}: ${verdict}`;
  }
  if (name === "refined" && data.error) return `not refined: ${data.error}`;
  if (name === "refined") {
    const [before, after] = [data.heldout_loss_before, data.heldout_loss].map((v) => v.toPrecision(4));
    return `refined for ${seconds(data.seconds)}: held-out loss ${before} → ${after}`;
  }
  return `planned anew: ${size(data.plan)}, because ${data.reason}`;
}
