// Parts that several views share.
import { html, useEffect, useRef, useState } from "./vendor/preact.js";
import uPlot from "./vendor/uplot.js";

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const [unit, size] = [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]].find(([, s]) => value >= s) ?? ["B", 1];
  const number = value / size;
  return `${number >= 100 || size === 1 ? number.toFixed(0) : number.toPrecision(3)} ${unit}`;
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  return value < 1 ? `${(value * 1000).toFixed(0)} ms` : `${value.toPrecision(3)} s`;
}

// Seconds of one batch that so many of 100 batches keep.
export const latency = (cost, percentile) => (percentile === 50 ? cost.latency_seconds : cost.latency_p95_seconds);
export const latencyName = (percentile) => (percentile === 50 ? "latency, median" : "latency");

export const share = (value) => (value === undefined ? "–" : `${Math.round(100 * value)} %`);

export const size = (plan) =>
  plan.mode === "dense" ? `depth ${plan.depth}, dense` : `depth ${plan.depth}, rank ${plan.rank}`;

// How images are sampled, in a few words; `sampling` is null in records of older releases.
export function told(sampling) {
  if (!sampling) return "25 guided steps";
  const { num_inference_steps: steps, scheduler, guidance_scale: scale, guidance_start, guidance_stop, guide } = sampling;
  const when = guidance_start > 0 || guidance_stop < 1
    ? ` from ${share(guidance_start)} to ${share(guidance_stop)} of them` : "";
  const by = guide ? ` by ${size(guide)}` : "";
  return `${steps} steps of ${scheduler}, ${scale > 1 ? `guided ${scale}×${by}${when}` : "unguided"}`;
}

// Words of the trade, told where somebody points at them.
const WORDS = {
  Σ: "A few thousand scales of a model's own: each of its layers is U · Σ · V, and U and V are the family's",
  rank: "How many of the family's shared components a layer uses",
  quality: "Share of the way from the family's worst pictures to real ones that this size has gone, of those that show what was asked for",
  latency: "Seconds for one batch, which 95 of 100 batches keep; the median half of them",
  materialised: "Every weight is written out: faster, and larger",
  factored: "Weights are kept as U, Σ and V: smaller, and slower",
  dense: "An imported model's own layers, of which some are left out",
  revision: "Revision 0 is served as soon as it is assembled; the next one has been retrained",
};
export const Word = ({ of, children }) => html`<abbr title=${WORDS[of] ?? WORDS[of.toLowerCase()]}>${children ?? of}</abbr>`;

// Budgets as people call them.
export const BUDGETS = { max_mem_gb: "memory", max_latency_ms: "time", min_quality: "quality" };

// How people tell models apart.
export const title = ({ family, plan }) =>
  `${family} · ${bytes(plan.predicted.memory_bytes)} · ${plan.dtype}`;

export function ago(date) {
  const minutes = (Date.now() - new Date(date)) / 60000;
  if (minutes < 1) return "just now";
  if (minutes < 60) return `${Math.round(minutes)} min ago`;
  return minutes < 48 * 60 ? `${Math.round(minutes / 60)} h ago` : new Date(date).toLocaleDateString();
}

export function Copy({ text }) {
  const [done, setDone] = useState(false);
  return html`<button type="button" class="small" onClick=${async () => {
    await navigator.clipboard.writeText(text);
    setDone(true);
    setTimeout(() => setDone(false), 1500);
  }}>${done ? "Copied" : "Copy"}</button>`;
}

// One class at one size from the family's sheet of previews, which has a row for each shared size.
export function Picture({ family, plan, label = 0, pixels = 64, alt = "" }) {
  const { depths, ranks } = family.sizes;
  const row = depths.indexOf(plan.depth) * ranks.length + ranks.indexOf(plan.rank);
  const rows = depths.length * ranks.length;
  const columns = family.class_names.length;
  if (plan.mode === "dense" || row < 0) return null;
  const part = (i, of) => `${of > 1 ? (100 * i) / (of - 1) : 0}%`;
  const style = {
    width: `${pixels}px`,
    height: `${pixels}px`,
    backgroundImage: `url(families/${family.name}/previews.png)`,
    backgroundSize: `${100 * columns}% ${100 * rows}%`,
    backgroundPosition: `${part(label, columns)} ${part(row, rows)}`,
  };
  return html`<span class="picture" style=${style} role="img" aria-label=${alt || `${family.class_names[label]}, a sample of ${size(plan)}`}></span>`;
}

// A table, whose rows are cards on a narrow screen; the first cell names its row.
export function Table({ label, columns, rows }) {
  return html`<div class="overflow-auto" tabindex="0" role="region" aria-label=${label}><table>
    <thead><tr>${columns.map((name) => html`<th scope="col">${name}</th>`)}</tr></thead>
    <tbody>${rows.map(([first, ...cells]) => html`<tr>
      <th scope="row" data-label=${columns[0]}>${first}</th>
      ${cells.map((cell, i) => html`<td data-label=${columns[i + 1]}>${cell}</td>`)}
    </tr>`)}</tbody>
  </table></div>`;
}

// A line of numbers over time; gaps where there is none.
export function Sparkline({ label, values, format, now }) {
  const known = values.filter((value) => value !== null && value !== undefined);
  const top = Math.max(...known, 1e-9);
  const x = (i) => (100 * i) / Math.max(1, values.length - 1);
  const points = values.map((value, i) => [x(i), value === null || value === undefined ? null : 23 - 21 * (value / top)]);
  const path = points.map(([at, y], i) => (y === null ? "" : `${i && points[i - 1][1] !== null ? "L" : "M"}${at.toFixed(1)} ${y.toFixed(1)}`)).join("");
  const last = known.at(-1);
  return html`<figure class="spark" role="img" aria-label=${`${label}: ${format(last ?? null)} now, at most ${format(known.length ? top : null)} lately`}>
    <figcaption>${label}</figcaption><strong>${now ?? format(last ?? null)}</strong>
    <svg viewBox="0 0 100 24" preserveAspectRatio="none" aria-hidden="true"><path d=${path} /></svg>
  </figure>`;
}

export const moment = (text) => new Date(text).toLocaleTimeString();
export const png = (b64) => `data:image/png;base64,${b64}`;

export const State = ({ of }) => html`<span class=${`state ${of}`}>${of}</span>`;

export const Problem = ({ of }) =>
  of ? html`<p class="problem" role="alert">${of.message ?? of}</p>` : null;

export function Figures({ of }) {
  const entries = Object.entries(of);
  return html`<dl class="figures">
    ${entries.map(([name, value]) => html`<div><dt>${name.split(",")[0] in WORDS ? html`<${Word} of=${name.split(",")[0]}>${name}<//>` : name}</dt><dd>${value}</dd></div>`)}
  </dl>`;
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Chart of uPlot's `data`, with `series` [{label, line?, ring?, faint?}]; `label` tells it in words.
export function Chart({ label, series, data, x, y, height = 260 }) {
  const place = useRef();
  useEffect(() => {
    const quiet = colour("--quiet");
    const axis = (title, format) => ({
      label: title,
      stroke: quiet,
      grid: { stroke: `${quiet}22` },
      ticks: { stroke: `${quiet}22` },
      values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : format(tick))),
    });
    const chart = new uPlot(
      {
        width: place.current.clientWidth,
        height,
        cursor: { drag: { x: false, y: false } },
        scales: { x: { time: false, distr: x.log ? 3 : 1 }, y: { distr: y.log ? 3 : 1 } },
        axes: [axis(x.title, x.format), { ...axis(y.title, y.format), size: 64, labelGap: 6 }],
        legend: { live: false },
        series: [
          { label: x.title, value: (_, v) => (v === null ? "–" : x.format(v)) },
          ...series.map(({ label: name, line, ring, faint }) => ({
            label: name,
            stroke: faint ? quiet : colour("--accent"),
            width: line ? 2 : 0,
            paths: line ? undefined : () => null,
            points: { show: true, size: ring ? 15 : 7, fill: ring || faint ? "transparent" : undefined },
            value: (_, v) => (v === null || v === undefined ? "–" : y.format(v)),
          })),
        ],
      },
      data,
      place.current,
    );
    const resized = new ResizeObserver(() =>
      chart.setSize({ width: place.current.clientWidth, height }),
    );
    resized.observe(place.current);
    return () => {
      resized.disconnect();
      chart.destroy();
    };
  }, [JSON.stringify(data)]);
  return html`<div class="chart" role="img" aria-label=${label} ref=${place}></div>`;
}
