// The same seeds from several models side by side; images appear step by step.
import { html, useEffect, useRef, useState } from "./vendor/preact.js";
import { FINISHED, follow, get, post } from "./api.js";
import { Problem, png, seconds, size, told } from "./parts.js";

export function Playground({ live, families }) {
  const servable = live.models.filter(
    (model) => model.revision !== null && !["failed", "cancelled"].includes(model.status),
  );
  const [chosen, setChosen] = useState(null);
  const calibrated = families.filter((family) => family.quality);
  const [elastic, setElastic] = useState({ family: "", seconds: 2 });
  const [form, setForm] = useState({ label: "", steps: "", guidance: "", seed: 1, scheduler: "" });
  const [runs, setRuns] = useState([]);
  const models = chosen ?? servable.slice(0, 1).map((model) => model.id);
  const classesOf = (model) => model?.class_names ?? families.find((f) => f.name === model?.family)?.class_names ?? [];
  const classes = classesOf(servable.find((m) => models.includes(m.id)) ?? { family: elastic.family });
  const label = classes.includes(form.label) ? form.label : "";
  const set = (name, number) => (event) =>
    setForm({ ...form, [name]: number && event.target.value ? Number(event.target.value) : event.target.value });

  const toggle = (id) => (event) =>
    setChosen(event.target.checked ? [...models, id] : models.filter((other) => other !== id));

  function generate(event) {
    event.preventDefault();
    const body = {
      ...Object.fromEntries(Object.entries({
        num_inference_steps: form.steps, guidance_scale: form.guidance, scheduler: form.scheduler, seed: form.seed,
      }).filter(([, value]) => value !== "")), // the model's plan says the rest
      previews: true,
      ...(label && { class_labels: [label], n: 4 }),
    };
    const started = Date.now();
    const asked = servable.filter((m) => models.includes(m.id)).map((model) => ({ of: model.id, title: size(model.plan), name: model.name, names: classesOf(model), body: { ...body, model: model.id }, started }));
    if (elastic.family) {
      const within = { family: elastic.family, deadline_seconds: Number(elastic.seconds) };
      asked.push({ of: elastic.family, title: `within ${elastic.seconds} s`, name: elastic.family, names: classesOf({ family: elastic.family }), body: { ...body, ...within }, started });
    }
    setRuns(asked);
  }

  if (!servable.length && !calibrated.length) {
    return html`<h1>Playground</h1>
      <p>No model can be sampled from yet. <a href="#budgets">Choose a budget</a> to make one.</p>`;
  }
  return html`
    <h1>Playground</h1>
    <form onSubmit=${generate}>
      ${servable.length > 0 && html`<fieldset class="choices">
        <legend>Models</legend>
        ${servable.map((model) => html`<label key=${model.id}>
          <input type="checkbox" checked=${models.includes(model.id)} onChange=${toggle(model.id)} />
          ${size(model.plan)} <span class="quiet">${model.name}</span>
        </label>`)}
      </fieldset>`}
      <fieldset class="grid">
        <legend>Whatever size of a family is there in time</legend>
        <label>Family
          <select value=${elastic.family} onChange=${(event) => setElastic({ ...elastic, family: event.target.value })}>
            <option value="">none</option>
            ${calibrated.map(({ name }) => html`<option value=${name}>${name}</option>`)}
          </select>
        </label>
        <label>Within, seconds
          <input type="number" min="0.05" step="0.05" value=${elastic.seconds} onInput=${(event) => setElastic({ ...elastic, seconds: event.target.value })} />
        </label>
      </fieldset>
      <fieldset class="grid">
        <label>Class
          <select value=${label} onChange=${set("label")}>
            <option value="">every class</option>
            ${classes.map((name) => html`<option value=${name}>${name}</option>`)}
          </select>
        </label>
        <label>Steps
          <input type="number" min="1" max="250" placeholder="as planned" value=${form.steps} onInput=${set("steps", true)} />
        </label>
        <label>Guidance
          <input type="number" min="1" max="20" step="0.1" placeholder="as planned" value=${form.guidance} onInput=${set("guidance", true)} />
        </label>
        <label>Scheduler
          <select value=${form.scheduler} onChange=${set("scheduler")}>
            <option value="">as planned</option>
            ${["ddim", "dpmsolver++", "euler"].map((name) => html`<option value=${name} selected=${name === form.scheduler}>${name}</option>`)}
          </select>
        </label>
        <label>Seed
          <input type="number" min="0" value=${form.seed} onInput=${set("seed", true)} />
        </label>
      </fieldset>
      <button type="submit" disabled=${!models.length && !elastic.family}>Generate</button>
    </form>
    <div class="columns">${runs.map((run) => html`<${Run} key=${run.started + run.of} ...${run} />`)}</div>`;
}

function Run({ title, name, body, names }) {
  const [progress, setProgress] = useState({ step: 0, steps: 1 });
  const [done, setDone] = useState(null);
  const [problem, setProblem] = useState(null);
  const stop = useRef(() => {});

  useEffect(() => {
    let gone = false;
    (async () => {
      try {
        const { id } = await post("generate", body, { prefer: "respond-async" });
        if (gone) return;
        stop.current = follow(`generations/${id}/events`, {
          progress: setProgress,
          status: async (data) => {
            if (!FINISHED.has(data.status)) return;
            stop.current();
            if (data.status === "done") setDone(await get(`generations/${id}`));
            else setProblem(data.error ?? `The generation was ${data.status}`);
          },
        });
      } catch (error) {
        setProblem(error);
      }
    })();
    return () => {
      gone = true;
      stop.current();
    };
  }, []);

  return html`<article aria-label=${title}>
    <header>${title} <span class="quiet">${name}</span></header>
    <${Problem} of=${problem} />
    ${!done && !problem && html`
      <progress value=${progress.step} max=${progress.steps} aria-label="Denoising steps"></progress>
      ${progress.b64_png && html`<img class="still" src=${png(progress.b64_png)} alt="The first image so far" />`}`}
    ${done && html`
      <div class="images">${done.images.map((image) => html`<figure>
        <img src=${png(image.b64_png)} alt=${names[image.class_label] ?? `class ${image.class_label}`} />
        <figcaption>${names[image.class_label] ?? image.class_label}</figcaption>
      </figure>`)}</div>
      ${done.elastic && html`<p>depth ${done.elastic.size.depth} of the family, quality ${done.elastic.quality.toFixed(2)}, there in ${seconds(done.elastic.took_seconds)}</p>`}
      <p class="quiet">${told(done.sampling)}; ${seconds(done.seconds.sampling)} to sample, ${seconds(done.seconds.queued)} in the queue</p>`}
  </article>`;
}
