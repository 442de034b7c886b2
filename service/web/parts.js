// Parts that several views share.
import { html, useEffect, useRef } from "./vendor/preact.js";
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

export const moment = (text) => new Date(text).toLocaleTimeString();
export const png = (b64) => `data:image/png;base64,${b64}`;

export const State = ({ of }) => html`<span class=${`state ${of}`}>${of}</span>`;

export const Problem = ({ of }) =>
  of ? html`<p class="problem" role="alert">${of.message ?? of}</p>` : null;

export function Figures({ of }) {
  const entries = Object.entries(of);
  return html`<dl class="figures">
    ${entries.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}
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
