// A budget, typed, dragged or taken from a card; the size that keeps it; and a click to deploy it.
import { html, useEffect, useRef, useState } from "./vendor/preact.js";
import { get, post } from "./api.js";
import { Front, upper } from "./front.js";
import { BUDGETS, Figures, Picture, Problem, Table, Word, bytes, latency as took, latencyName, seconds, share, size, told } from "./parts.js";

const STEPS = 200;
const EVERYTHING = { max_mem_gb: 10000 };
const REFINEMENTS = { 0: "No", 60: "For a minute", 600: "For ten minutes", 3600: "For an hour" }; // by seconds
const UNITS = { memory: { gb: 1e9, mb: 1e6, kb: 1e3, b: 1, "": 1e9 }, latency: { s: 1, ms: 1e-3, "": 1 } };
const PERCENTILES = [[95, "95th percentile"], [50, "median"]];
const SHOWN = 4;

// What somebody typed, in bytes or seconds; null where it says nothing.
function parsed(kind, text) {
  const [, number, unit] = text.trim().toLowerCase().match(/^([\d.,]+)\s*([a-z]*)$/) ?? [];
  const value = Number(number?.replace(",", ".")) * UNITS[kind][unit];
  return value > 0 && Number.isFinite(value) ? value : null;
}

// A budget: typed with a unit, or dragged over the range of the sizes.
function Limit({ kind, label, value, range, format, onChange, children }) {
  const [text, setText] = useState(null);
  const [low, high] = range;
  const position = Math.round((STEPS * Math.log(value / low)) / Math.log(high / low));
  const at = Math.min(STEPS, Math.max(0, position));
  return html`<div class="limit">
    <div class="says"><label for=${kind}>${label}</label>${children}</div>
    <input id=${kind} class="typed" type="text" inputmode="decimal" value=${text ?? format(value)} aria-invalid=${text !== null && parsed(kind, text) === null ? "true" : undefined}
      onInput=${(event) => {
        setText(event.target.value);
        const given = parsed(kind, event.target.value);
        if (given !== null) onChange(given);
      }} onBlur=${() => setText(null)} />
    <input type="range" min="0" max=${STEPS} value=${at} aria-label=${`${label}, dragged`} aria-valuetext=${format(value)}
      onInput=${(event) => onChange(low * (high / low) ** (Number(event.target.value) / STEPS))} />
  </div>`;
}

// The smallest size, the best, and the one that gives most of the best's quality for its memory.
function presets(front) {
  const line = upper(front);
  const [small, best] = [line[0], line.at(-1)];
  const gain = (p) => (p.quality - small.quality) / (best.quality - small.quality || 1);
  const cost = (p) => Math.log(p.predicted.memory_bytes / small.predicted.memory_bytes) / (Math.log(best.predicted.memory_bytes / small.predicted.memory_bytes) || 1);
  const balanced = line.reduce((a, b) => (gain(b) - cost(b) > gain(a) - cost(a) ? b : a));
  const found = [["Smallest", small], ["Balanced", balanced], ["Best", best]];
  return found.filter(([, p], i) => found.findIndex(([, other]) => other === p) === i);
}

const less = (of, than) => (of >= than * 0.995 ? "the whole family" : `${share(1 - of / than)} less than the largest`);

function Card({ name, plan, largest, family, percentile, chosen, onTake }) {
  const memory = plan.predicted.memory_bytes;
  return html`<button type="button" class="card" aria-pressed=${chosen} onClick=${onTake}>
    <strong>${name}</strong>
    ${family && html`<span class="strip">${[0, 1, 2].map((i) => html`<${Picture} family=${family} plan=${plan} label=${Math.floor((i * family.class_names.length) / 3)} pixels=${64} />`)}</span>`}
    <span class="big">${bytes(memory)}</span>
    <span class="quiet">${seconds(took(plan.predicted, percentile))} · quality ${plan.quality.toFixed(2)}</span>
    <span class="saves">${less(memory, largest.predicted.memory_bytes)}</span>
  </button>`;
}

// The same classes by two sizes, under a divider.
function Compare({ family, plan, best }) {
  const [at, setAt] = useState(50);
  const labels = Array.from({ length: Math.min(SHOWN, family.class_names.length) }, (_, i) => Math.floor((i * family.class_names.length) / SHOWN));
  const pictures = (of) => labels.map((label) => html`<${Picture} family=${family} plan=${of} label=${label} pixels=${128} />`);
  const alike = plan.depth === best.depth && plan.rank === best.rank;
  return html`<figure class="compare">
    <div class="halves">
      <div class="half">${pictures(plan)}</div>
      ${!alike && html`<div class="half over" aria-hidden="true" style=${{ clipPath: `inset(0 0 0 ${at}%)` }}>${pictures(best)}</div>
        <span class="divider" style=${{ left: `${at}%` }}></span>`}
    </div>
    ${!alike && html`<input type="range" min="0" max="100" value=${at} aria-label="Divider between this size and the largest" onInput=${(event) => setAt(Number(event.target.value))} />`}
    <figcaption class="quiet">${alike ? "Samples of this size." : html`<span>Left: this size.</span> <span>Right: the largest, ${bytes(best.predicted.memory_bytes)}.</span>`} Before its <${Word} of="Σ" /> is retrained.</figcaption>
  </figure>`;
}

// What the model takes beside the largest, and the process around either.
function Saving({ plan, largest }) {
  const around = Math.max(0, plan.predicted.process_memory_bytes - plan.predicted.memory_bytes);
  const [ours, most] = [plan.predicted.memory_bytes, largest.predicted.memory_bytes];
  return html`<div class="saving">
    <div class="bar" role="img" aria-label=${`This model takes ${bytes(ours)}, the largest ${bytes(most)}`}>
      <span style=${{ width: `${Math.max(1, (100 * ours) / Math.max(ours, most))}%` }}></span></div>
    <p class="quiet"><strong>${bytes(ours)}</strong> of the ${bytes(most)} that the largest takes. The process that serves it takes ${bytes(around)} more, once for all its models.</p>
  </div>`;
}

export function Budgets({ id, families, live }) {
  const [everything, setEverything] = useState(null);
  const [wanted, setWanted] = useState(undefined); // the service's default family
  const [budget, setBudget] = useState(null); // {memory, latency} in bytes and seconds
  const [percentile, setPercentile] = useState(95); // that the latency is of
  const [work, setWork] = useState({ n: 4, steps: "", guidance: "" });
  const [answer, setAnswer] = useState(null);
  const [problem, setProblem] = useState(null);
  const [busy, setBusy] = useState(false);
  const [refinement, setRefinement] = useState(0);
  const [tasks, setTasks] = useState([]);
  const task = tasks.find((other) => other.id === id);
  const newest = useRef(0);

  const workload = {
    n: work.n,
    ...(work.steps && { num_inference_steps: work.steps }),
    ...(work.guidance && { guidance_scale: work.guidance }),
  };
  useEffect(() => {
    get("tasks").then((answer) => setTasks(answer.tasks), () => {});
  }, []);
  useEffect(() => {
    setWanted(task?.family);
  }, [task]);
  useEffect(() => {
    let current = true;
    post("plan", { ...EVERYTHING, ...workload, family: wanted }).then(
      (plan) => {
        if (!current) return;
        setEverything(plan);
        setProblem(null);
        if (plan.family !== everything?.family) setBudget(null);
      },
      (error) => current && setProblem(error),
    );
    return () => (current = false);
  }, [families.length, wanted, JSON.stringify(workload)]);

  const front = everything?.front ?? [];
  const range = (of) => [Math.min(...front.map(of)) * 0.9, Math.max(...front.map(of)) * 1.1];
  const ranges = front.length && {
    memory: range((p) => p.predicted.memory_bytes),
    latency: range((p) => took(p.predicted, percentile)),
  };
  const memory = budget?.memory ?? ranges?.memory?.[1];
  const latency = budget?.latency ?? ranges?.latency?.[1]; // all sizes keep it until somebody says less
  const asked = { max_mem_gb: memory / 1e9, max_latency_ms: latency * 1000, latency_percentile: percentile, family: everything?.family, ...workload };
  // a refined model has no factors
  if (refinement) asked.mode = front.every((p) => p.mode === "dense") ? "dense" : "materialised";

  useEffect(() => {
    if (!front.length) return;
    const number = ++newest.current; // answers may overtake each other
    post("plan", asked).then(
      (plan) => number === newest.current && (setAnswer(plan), setProblem(null)),
      (error) => number === newest.current && (setAnswer(null), setProblem(error)),
    );
  }, [everything, memory, latency, percentile, refinement]);

  async function deploy() {
    setBusy(true);
    try {
      const refine = refinement ? { max_seconds: refinement } : undefined;
      const model = await post("models", { ...asked, refine, task: id || undefined });
      location.hash = `#models/${model.id}`;
    } catch (error) {
      setProblem(error);
    }
    setBusy(false);
  }

  const lead = html`<h1>Budgets</h1>
    <p class="lead">Say what a model may cost. It is cut from one shared set of weights, retrained for a minute, measured against your budget, and served.</p>`;
  if (!everything) {
    return html`${lead}${problem
      ? html`<${Problem} of=${problem} />`
      : html`<p aria-busy="true">Asking for the sizes …</p>`}`;
  }
  const kept = (p) => p.predicted.memory_bytes <= memory && took(p.predicted, percentile) <= latency;
  const near = problem?.nearest_feasible;
  const nearest = near && { ...(near.max_mem_gb && { memory: near.max_mem_gb * 1e9 }), ...(near.max_latency_ms && { latency: near.max_latency_ms / 1000 }) };
  const nearestWords = near && [nearest.memory && bytes(nearest.memory), nearest.latency && seconds(nearest.latency)].filter(Boolean).join(" and ");
  const plan = answer?.plan;
  const family = families.find((other) => other.name === everything.family);
  const largest = front.reduce((a, b) => (b.predicted.memory_bytes > a.predicted.memory_bytes ? b : a));
  const take = (p) => setBudget({ memory: p.predicted.memory_bytes });
  const exactly = (p) => setBudget({ memory: p.predicted.memory_bytes, latency: took(p.predicted, percentile) });
  const sampler = live.status?.workers.find((worker) => worker.gauges.device_budget_bytes);
  const room = sampler && sampler.gauges.device_budget_bytes - (sampler.gauges.device_held_bytes ?? 0);
  const change = (name) => (event) => setWork({ ...work, [name]: event.target.value && Number(event.target.value) });
  const isShared = plan && plan.mode !== "dense" && family && !task;
  return html`
    ${lead}
    ${family?.licence === "random numbers" && html`<p class="note" role="note"><strong>Shapes alone.</strong> ${family.name} has random weights: memory and latency are those of the real network, quality is a formula, and pictures are noise.</p>`}
    <div class="cards">${presets(front).map(([name, p]) => html`<${Card} name=${name} plan=${p} largest=${largest} percentile=${percentile} family=${p.mode === "dense" || task ? null : family}
      chosen=${Math.abs(memory / p.predicted.memory_bytes - 1) < 1e-9} onTake=${() => take(p)} />`)}</div>
    <div class="columns">
      <section aria-label="Budget" class="panel">
        ${tasks.length > 0 && html`<label>Classes
          <select onChange=${(event) => (location.hash = `#budgets/${event.target.value}`)}>
            <option value="" selected=${!task}>the family's own</option>
            ${tasks.map((other) => html`<option value=${other.id} selected=${other === task}>${other.name}</option>`)}
          </select>
        </label>`}
        ${families.length > 1 && !task && html`<label>Family
          <select value=${everything.family} onChange=${(event) => setWanted(event.target.value)}>
            ${families.map(({ name }) => html`<option value=${name}>${name}</option>`)}
          </select>
        </label>`}
        <${Limit} kind="memory" label="Memory" value=${memory} range=${ranges.memory} format=${bytes}
          onChange=${(to) => setBudget({ ...budget, memory: to })} />
        <${Limit} kind="latency" label="Latency" value=${latency} range=${ranges.latency} format=${seconds}
          onChange=${(to) => setBudget({ ...budget, latency: to })}>
          <select aria-label="Percentile of the latency" value=${percentile} onChange=${(event) => setPercentile(Number(event.target.value))}>
            ${PERCENTILES.map(([of, name]) => html`<option value=${of}>${name}</option>`)}
          </select>
        <//>
        ${room > 0 && html`<button type="button" class="small machine" onClick=${() => setBudget({ ...budget, memory: room })}>
          This machine: ${bytes(room)} free for models, of ${bytes(sampler.gauges.device_budget_bytes)}</button>`}
        <details>
          <summary>Images at once, steps, guidance, refinement</summary>
          <div class="grid">
            <label>Images at once <input type="number" min="1" max="128" value=${work.n} onChange=${change("n")} /></label>
            <label>Steps <input type="number" min="1" max="250" placeholder="chosen" value=${work.steps} onChange=${change("steps")} /></label>
            <label>Guidance <input type="number" min="1" max="20" step="0.1" placeholder="chosen" value=${work.guidance} onChange=${change("guidance")} /></label>
          </div>
          <label>Refine every weight, after <${Word} of="Σ" />
            <select value=${refinement} onChange=${(event) => setRefinement(Number(event.target.value))}>
              ${Object.entries(REFINEMENTS).map(([s, name]) => html`<option value=${s}>${name}</option>`)}
            </select>
          </label>
        </details>
        <p class="quiet">On ${everything.device_class}.</p>
      </section>
      <section aria-label="The size that keeps it" class="panel result" aria-live="polite">
        ${nearest
          ? html`<p class="problem" role="alert">No size fits: the nearest needs ${nearestWords}.</p>
            <p><button type="button" class="small" onClick=${() => setBudget({ ...budget, ...nearest })}>Take ${nearestWords}</button></p>`
          : html`<${Problem} of=${problem} />`}
        ${plan && html`
          <h2>${size(plan)} <span class="badge">fits: ${percent(plan.predicted.memory_bytes / memory)} of ${bytes(memory)}</span></h2>
          ${isShared && html`<${Compare} family=${family} plan=${plan} best=${largest.mode === "dense" ? plan : largest} />`}
          <${Figures} of=${{
            memory: bytes(plan.predicted.memory_bytes),
            [latencyName(percentile)]: html`${seconds(took(plan.predicted, percentile))}${plan.latency_estimated && html` <span class="quiet">estimated</span>`}`,
            quality: plan.quality.toFixed(2),
            ...(plan.class_accuracy !== null && { "right class": share(plan.class_accuracy) }),
          }} />
          <${Saving} plan=${plan} largest=${largest} />
          <p class="quiet"><${Word} of=${plan.mode} />, ${plan.dtype}; ${told(plan.sampling)}.
            ${answer.binding.length > 0 && ` With more ${answer.binding.map((name) => BUDGETS[name]).join(" or ")} it would be better.`}</p>`}
        <button type="button" disabled=${!plan || busy} aria-busy=${busy} onClick=${deploy}>Deploy this size</button>
      </section>
    </div>
    <section aria-label="Sizes">
      <h2>All sizes of ${everything.family}</h2>
      <${Front} front=${front} kept=${kept} plan=${plan} memory=${memory} percentile=${percentile} onPick=${exactly} />
    </section>
    <details>
      <summary>As a table</summary>
      <${Table} label="Pareto front" columns=${["size", "mode", "dtype", "sampling", "memory", latencyName(percentile), "quality"]} rows=${front.map((p) => [
        size(p), p.mode, p.dtype, told(p.sampling), bytes(p.predicted.memory_bytes),
        seconds(took(p.predicted, percentile)), p.quality.toFixed(4),
      ])} />
    </details>`;
}

const percent = (value) => `${value >= 0.1 ? Math.round(100 * value) : Number((100 * value).toPrecision(1))} %`;
