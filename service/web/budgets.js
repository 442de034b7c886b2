// Two sliders over the Pareto front, the size that a budget gives, and a click to deploy it.
import { html, useEffect, useRef, useState } from "./vendor/preact.js";
import { get, post } from "./api.js";
import { Chart, Figures, Problem, bytes, seconds, share, size, told } from "./parts.js";

const STEPS = 200;
const EVERYTHING = { max_mem_gb: 10000 };
const START = { memory: STEPS, latency: STEPS };
const REFINEMENTS = { 0: "not", 60: "a minute", 600: "ten minutes", 3600: "an hour" }; // by seconds

// A slider's position from 0 to STEPS on a logarithmic scale, a little beyond both ends.
function scale(values) {
  const [low, high] = [Math.min(...values) * 0.9, Math.max(...values) * 1.1];
  return (position) => low * (high / low) ** (position / STEPS);
}

function Slider({ label, position, text, onInput }) {
  return html`<label>
    ${label} <span class="value">${text}</span>
    <input type="range" min="0" max=${STEPS} value=${position} aria-valuetext=${text}
      onInput=${(event) => onInput(Number(event.target.value))} />
  </label>`;
}

export function Budgets({ id, families }) {
  const [everything, setEverything] = useState(null);
  const [wanted, setWanted] = useState(undefined); // the service's default family
  const [positions, setPositions] = useState(START);
  const [answer, setAnswer] = useState(null);
  const [problem, setProblem] = useState(null);
  const [busy, setBusy] = useState(false);
  const [refinement, setRefinement] = useState(0);
  const [tasks, setTasks] = useState([]);
  const task = tasks.find((other) => other.id === id);
  const newest = useRef(0);

  useEffect(() => {
    get("tasks").then((answer) => setTasks(answer.tasks), () => {});
  }, []);
  useEffect(() => {
    setWanted(task?.family);
  }, [task]);
  useEffect(() => {
    let current = true;
    post("plan", { ...EVERYTHING, family: wanted }).then(
      (plan) => current && setEverything(plan),
      (error) => current && setProblem(error),
    );
    return () => (current = false);
  }, [families.length, wanted]);

  const front = everything?.front ?? [];
  const memory = front.length ? scale(front.map((p) => p.predicted.memory_bytes))(positions.memory) : 0;
  const latency = front.length
    ? scale(front.map((p) => p.predicted.latency_p95_seconds))(positions.latency)
    : 0;
  const budget = { max_mem_gb: memory / 1e9, max_latency_ms: latency * 1000, family: everything?.family };
  // a refined model has no factors
  if (refinement) budget.mode = front.every((p) => p.mode === "dense") ? "dense" : "materialised";

  useEffect(() => {
    if (!front.length) return;
    const number = ++newest.current; // answers may overtake each other
    post("plan", budget).then(
      (plan) => number === newest.current && (setAnswer(plan), setProblem(null)),
      (error) => number === newest.current && (setAnswer(null), setProblem(error)),
    );
  }, [everything, positions.memory, positions.latency, refinement]);

  async function deploy() {
    setBusy(true);
    try {
      const refine = refinement ? { max_seconds: refinement } : undefined;
      const model = await post("models", { ...budget, refine, task: id || undefined });
      location.hash = `#models/${model.id}`;
    } catch (error) {
      setProblem(error);
    }
    setBusy(false);
  }

  if (!everything) {
    return html`<h1>Budgets</h1>${problem
      ? html`<${Problem} of=${problem} />`
      : html`<p aria-busy="true">Asking for the front …</p>`}`;
  }
  const kept = (p) =>
    p.predicted.memory_bytes <= memory && p.predicted.latency_p95_seconds <= latency;
  const plan = answer?.plan;
  const family = families.find((other) => other.name === everything.family);
  return html`
    <h1>Budgets</h1>
    <p>Set a budget; the best size that keeps it is found as you drag.</p>
    <div class="columns">
      <section aria-label="Budget">
        ${tasks.length > 0 && html`<label>Classes
          <select onChange=${(event) => (location.hash = `#budgets/${event.target.value}`)}>
            <option value="" selected=${!task}>the family's own</option>
            ${tasks.map((other) => html`<option value=${other.id} selected=${other === task}>${other.name}</option>`)}
          </select>
        </label>`}
        ${families.length > 1 && !task && html`<label>Family
          <select value=${everything.family} onChange=${(event) => {
            setPositions(START);
            setWanted(event.target.value);
          }}>
            ${families.map(({ name }) => html`<option value=${name}>${name}</option>`)}
          </select>
        </label>`}
        <${Slider} label="Memory" position=${positions.memory} text=${bytes(memory)}
          onInput=${(to) => setPositions({ ...positions, memory: to })} />
        <${Slider} label="Latency, 95th percentile" position=${positions.latency} text=${seconds(latency)}
          onInput=${(to) => setPositions({ ...positions, latency: to })} />
        <label>Refine every weight, after Σ
          <select value=${refinement} onChange=${(event) => setRefinement(Number(event.target.value))}>
            ${Object.entries(REFINEMENTS).map(([s, name]) => html`<option value=${s}>${name}</option>`)}
          </select>
        </label>
        <p class="quiet">For 4 images on ${everything.device_class}; the sampling is chosen with the size.</p>
        <div aria-live="polite">
          <${Problem} of=${problem} />
          ${plan && html`
            <h2>${size(plan)}</h2>
            <p class="quiet">${plan.mode}, ${plan.dtype}; ${told(plan.sampling)}</p>
            <${Figures} of=${{
              "memory, predicted": bytes(plan.predicted.memory_bytes),
              [plan.latency_estimated ? "latency, estimated" : "latency, predicted"]:
                seconds(plan.predicted.latency_p95_seconds),
              quality: plan.quality.toFixed(4),
              ...(plan.distance && {
                "distance to real pictures": plan.distance.toFixed(0),
                "class accuracy": share(plan.class_accuracy),
              }),
            }} />`}
        </div>
        <button onClick=${deploy} disabled=${!plan || busy} aria-busy=${busy}>Deploy this size</button>
      </section>
      <section aria-label="Sizes">
        <${Chart}
          label=${`${front.filter(kept).length} of ${front.length} sizes on the Pareto front keep the budget`}
          x=${{ title: "memory", format: bytes, log: true }}
          y=${{ title: "quality", format: (v) => v.toFixed(3) }}
          series=${[{ label: "keeps the budget" }, { label: "does not", faint: true }, { label: "the plan", ring: true }]}
          data=${chartData(front, kept, plan)} />
        ${plan && plan.mode !== "dense" && family && !task && html`<${Samples} family=${family} plan=${plan} />`}
      </section>
    </div>
    <details>
      <summary>The front as a table</summary>
      <div class="overflow-auto" tabindex="0" role="region" aria-label="Pareto front"><table>
        <thead><tr><th scope="col">size</th><th scope="col">mode</th><th scope="col">dtype</th><th scope="col">sampling</th>
          <th scope="col">memory</th><th scope="col">latency</th><th scope="col">quality</th></tr></thead>
        <tbody>${front.map((p) => html`<tr>
          <td>${size(p)}</td><td>${p.mode}</td><td>${p.dtype}</td><td>${told(p.sampling)}</td>
          <td>${bytes(p.predicted.memory_bytes)}</td>
          <td>${seconds(p.predicted.latency_p95_seconds)}</td><td>${p.quality.toFixed(4)}</td>
        </tr>`)}</tbody>
      </table></div>
    </details>`;
}

function chartData(front, kept, plan) {
  const points = [...front].sort((a, b) => a.predicted.memory_bytes - b.predicted.memory_bytes);
  const same = (p) => plan && JSON.stringify([size(p), p.mode, p.dtype, p.sampling]) === JSON.stringify([size(plan), plan.mode, plan.dtype, plan.sampling]);
  return [
    points.map((p) => p.predicted.memory_bytes),
    points.map((p) => (kept(p) ? p.quality : null)),
    points.map((p) => (kept(p) ? null : p.quality)),
    points.map((p) => (same(p) ? p.quality : null)),
  ];
}

// Row of the family's sheet of previews: every class at a size that shares U and V, not retrained.
function Samples({ family, plan }) {
  const { depths, ranks } = family.sizes;
  const row = depths.indexOf(plan.depth) * ranks.length + ranks.indexOf(plan.rank);
  const last = depths.length * ranks.length - 1;
  const style = {
    backgroundImage: `url(families/${family.name}/previews.png)`,
    backgroundPosition: `0 ${(100 * row) / last}%`,
    aspectRatio: `${family.class_names.length} / 1`,
  };
  return html`<figure>
    <div class="sample" role="img" style=${style}
      aria-label=${`Samples of ${size(plan)}: ${family.class_names.join(", ")}`}></div>
    <figcaption class="quiet">Samples at this size, one of each class, before Σ is retrained</figcaption>
  </figure>`;
}
