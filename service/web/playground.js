// The same seeds from several models side by side; images appear step by step.
import { html, useEffect, useRef, useState } from "./vendor/preact.js";
import { FINISHED, follow, get, post } from "./api.js";
import { Copy, Problem, bytes, png, seconds, size, title, told } from "./parts.js";

const KEPT = "fineserve.runs";
const MOST_KEPT = 6;
const MOST_SEED = 2 ** 31 - 1;
const KNOBS = {
  num_inference_steps: ["Steps", { min: 1, max: 250, step: 1 }],
  guidance_scale: ["Guidance", { min: 1, max: 20, step: 0.1 }],
  guidance_start: ["Guided from, 0 to 1", { min: 0, max: 1, step: 0.05 }],
  guidance_stop: ["Guided until, 0 to 1", { min: 0, max: 1, step: 0.05 }],
};

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEPT)) ?? [];
  } catch {
    return [];
  }
}
function keep(run) {
  try {
    localStorage.setItem(KEPT, JSON.stringify([run, ...kept().filter(({ key }) => key !== run.key)].slice(0, MOST_KEPT)));
  } catch { /* the store is full, or not ours to write */ }
}

// What a link to this view says: #playground/model=…&model=…&seed=…
function linked(id) {
  const query = new URLSearchParams(id ?? "");
  const { model, within, ...form } = Object.fromEntries(query);
  return { models: query.getAll("model"), within, form };
}

export function Playground({ id, live, families }) {
  const servable = live.models.filter(
    (model) => model.revision !== null && !["failed", "cancelled"].includes(model.status),
  );
  const link = useRef(linked(id)).current;
  const [chosen, setChosen] = useState(link.models.length ? link.models : null);
  const calibrated = families.filter((family) => family.quality);
  const [elastic, setElastic] = useState({ family: link.form.family ?? "", seconds: link.within ?? 2 });
  const [form, setForm] = useState({ label: "", n: "", seed: 1, scheduler: "", ...link.form });
  const [runs, setRuns] = useState(kept());
  const models = chosen ?? servable.slice(0, 1).map((model) => model.id);
  const classesOf = (model) => model?.class_names ?? families.find((f) => f.name === model?.family)?.class_names ?? [];
  const classes = classesOf(servable.find((m) => models.includes(m.id)) ?? { family: elastic.family });
  const label = classes.includes(form.label) ? form.label : "";
  const set = (name) => (event) => setForm({ ...form, [name]: event.target.value });
  const toggle = (id) => (event) =>
    setChosen(event.target.checked ? [...models, id] : models.filter((other) => other !== id));

  function generate(event) {
    event.preventDefault();
    const numbers = ["num_inference_steps", "guidance_scale", "guidance_start", "guidance_stop", "seed", "n"];
    const body = {
      ...Object.fromEntries(numbers.filter((name) => form[name] !== "" && form[name] !== undefined).map((name) => [name, Number(form[name])])),
      ...(form.scheduler && { scheduler: form.scheduler }), // the model's plan says the rest
      previews: true,
      ...(label && { class_labels: [label], n: Number(form.n) || 4 }),
    };
    const started = Date.now();
    const asked = servable.filter((m) => models.includes(m.id)).map((model) => ({ title: title(model), name: size(model.plan), names: classesOf(model), body: { ...body, model: model.id } }));
    if (elastic.family) {
      const within = { family: elastic.family, deadline_seconds: Number(elastic.seconds) };
      asked.push({ title: `${elastic.family} within ${elastic.seconds} s`, name: "", names: classesOf({ family: elastic.family }), body: { ...body, ...within } });
    }
    const query = new URLSearchParams(Object.entries({ ...form, label, ...(elastic.family && { family: elastic.family, within: elastic.seconds }) }).filter(([, value]) => value !== "" && value !== undefined));
    for (const model of models) query.append("model", model);
    history.replaceState(null, "", `#playground/${query}`);
    setRuns(asked.map((run, i) => ({ ...run, key: `${started}-${i}`, link: location.href })));
  }

  if (!servable.length && !calibrated.length) {
    return html`<h1>Playground</h1>
      <p>No model can be sampled from yet. <a href="#budgets">Choose a budget</a> to make one.</p>`;
  }
  return html`
    <h1>Playground</h1>
    <form onSubmit=${generate} class="panel">
      ${servable.length > 0 && html`<fieldset class="choices">
        <legend>Models, compared at the same seeds</legend>
        ${servable.map((model) => html`<label key=${model.id}>
          <input type="checkbox" checked=${models.includes(model.id)} onChange=${toggle(model.id)} />
          ${title(model)} <span class="quiet">${size(model.plan)}, ${model.id.slice(-4)}</span>
        </label>`)}
      </fieldset>`}
      <fieldset class="grid">
        <label>Class
          <select value=${label} onChange=${set("label")}>
            <option value="">every class</option>
            ${classes.map((name) => html`<option value=${name} selected=${name === label}>${name}</option>`)}
          </select>
        </label>
        <label>Images <input type="number" min="1" max="128" placeholder=${label ? "4" : "one of each"} value=${form.n} onInput=${set("n")} /></label>
        <label>Seed
          <span class="joined"><input type="number" min="0" aria-label="Seed" value=${form.seed} onInput=${set("seed")} />
          <button type="button" class="small" title="Draw a seed" onClick=${() => setForm({ ...form, seed: Math.floor(Math.random() * MOST_SEED) })}>Random</button></span>
        </label>
      </fieldset>
      <details>
        <summary>Steps, guidance, scheduler; or a family and a deadline</summary>
        <fieldset class="grid">
          ${Object.entries(KNOBS).map(([name, [words, limits]]) => html`<label>${words}
            <input type="number" ...${limits} placeholder="as planned" value=${form[name] ?? ""} onInput=${set(name)} /></label>`)}
          <label>Scheduler
            <select value=${form.scheduler} onChange=${set("scheduler")}>
              <option value="">as planned</option>
              ${["ddim", "dpmsolver++", "euler"].map((name) => html`<option value=${name} selected=${name === form.scheduler}>${name}</option>`)}
            </select>
          </label>
        </fieldset>
        <fieldset class="grid">
          <legend>Whatever size of a family is there in time</legend>
          <label>Family
            <select value=${elastic.family} onChange=${(event) => setElastic({ ...elastic, family: event.target.value })}>
              <option value="">none</option>
              ${calibrated.map(({ name }) => html`<option value=${name} selected=${name === elastic.family}>${name}</option>`)}
            </select>
          </label>
          <label>Within, seconds
            <input type="number" min="0.05" step="0.05" value=${elastic.seconds} onInput=${(event) => setElastic({ ...elastic, seconds: event.target.value })} />
          </label>
        </fieldset>
      </details>
      <button type="submit" disabled=${!models.length && !elastic.family}>Generate</button>
    </form>
    <div class="columns">${runs.map((run) => html`<${Run} key=${run.key} ...${run} id=${run.key} />`)}</div>`;
}

function Run({ title, name, body, names, id: key, link, done: before }) {
  const [progress, setProgress] = useState({ step: 0, steps: 1 });
  const [done, setDone] = useState(before ?? null);
  const [problem, setProblem] = useState(null);
  const [generation, setGeneration] = useState(null);
  const stop = useRef(() => {});

  useEffect(() => {
    if (before) return undefined;
    let gone = false;
    (async () => {
      try {
        const { id } = await post("generate", body, { prefer: "respond-async" });
        if (gone) return;
        setGeneration(id);
        stop.current = follow(`generations/${id}/events`, {
          progress: setProgress,
          status: async (data) => {
            if (!FINISHED.has(data.status)) return;
            stop.current();
            if (data.status === "done") {
              const made = await get(`generations/${id}`);
              setDone(made);
              keep({ key, title, name, body, names, link, done: made });
            } else setProblem(data.error ?? `The generation was ${data.status}`);
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

  const called = (image) => names[image.class_label] ?? `class ${image.class_label}`;
  return html`<article aria-label=${title}>
    <header>${title} <span class="quiet">${name}</span></header>
    <${Problem} of=${problem} />
    ${!done && !problem && html`
      <div class="row tight"><progress value=${progress.step} max=${progress.steps} aria-label="Denoising steps"></progress>
        <button type="button" class="small" disabled=${!generation} onClick=${() => post(`generations/${generation}/cancel`, {}).catch(setProblem)}>Cancel</button></div>
      ${progress.b64_png && html`<img class="still" src=${png(progress.b64_png)} alt="The first image so far" />`}`}
    ${done && html`
      <div class="images">${done.images.map((image) => html`<figure>
        <a href=${png(image.b64_png)} download=${`${called(image)}-${image.seed}.png`} title="Download"><img src=${png(image.b64_png)} alt=${called(image)} /></a>
        <figcaption>${called(image)}</figcaption>
      </figure>`)}</div>
      ${done.elastic && html`<p>depth ${done.elastic.size.depth} of the family, quality ${done.elastic.quality.toFixed(2)}, there in ${seconds(done.elastic.took_seconds)}</p>`}
      <p class="quiet">${told(done.sampling)}; ${seconds(done.seconds.sampling)} to sample, ${seconds(done.seconds.queued)} in the queue; ${bytes(done.images.reduce((sum, image) => sum + image.b64_png.length * 0.75, 0))}.</p>
      <p class="row tight"><${Copy} text=${link} /> <span class="quiet">a link that makes these again</span></p>`}
  </article>`;
}
