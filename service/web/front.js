// The Pareto front as a picture: memory, quality, latency by colour, and the budget.
import { html, useEffect, useRef, useState } from "./vendor/preact.js";
import { bytes, latency, seconds, size } from "./parts.js";

const HEIGHT = 320;
const EDGE = { left: 60, right: 18, top: 18, bottom: 44 };

// Sizes that none needs less memory for as good pictures, smallest first.
export function upper(front) {
  const sorted = [...front].sort((a, b) => a.predicted.memory_bytes - b.predicted.memory_bytes || b.quality - a.quality);
  let best = -1;
  return sorted.filter((p) => p.quality > best && ((best = p.quality), true));
}

// Round numbers of a logarithmic axis, at most so many.
function ticks(low, high, most = 6) {
  const found = [];
  for (let power = 10 ** Math.floor(Math.log10(low)); power <= high; power *= 10) {
    for (const step of [1, 2, 5]) if (step * power >= low && step * power <= high) found.push(step * power);
  }
  const every = Math.ceil(found.length / most);
  return found.filter((_, i) => i % every === 0);
}

export function Front({ front, kept, plan, memory, percentile, onPick }) {
  const place = useRef();
  const [width, setWidth] = useState(720);
  useEffect(() => {
    const resized = new ResizeObserver(([{ contentRect }]) => setWidth(Math.max(280, contentRect.width)));
    resized.observe(place.current);
    return () => resized.disconnect();
  }, []);
  const line = upper(front);
  const others = front.filter((p) => !line.includes(p));
  const sizes = front.map((p) => p.predicted.memory_bytes);
  const [low, high] = [Math.min(...sizes) * 0.85, Math.max(...sizes) * 1.2];
  const qualities = front.map((p) => p.quality);
  const [worst, best] = [Math.min(...qualities), Math.max(...qualities)];
  const room = (best - worst || 0.1) * 0.12;
  const x = (value) => EDGE.left + ((width - EDGE.left - EDGE.right) * Math.log(value / low)) / Math.log(high / low);
  const y = (value) => HEIGHT - EDGE.bottom - ((HEIGHT - EDGE.top - EDGE.bottom) * (value - worst + room)) / (best - worst + 2 * room);
  const took = (p) => latency(p.predicted, percentile);
  const times = front.map(took);
  const [fast, slow] = [Math.min(...times), Math.max(...times)];
  const slowness = (p) => (slow > fast ? Math.log(took(p) / fast) / Math.log(slow / fast) : 0);
  const same = (p) => plan && p.depth === plan.depth && p.rank === plan.rank && p.mode === plan.mode && p.dtype === plan.dtype;
  const chosen = plan && { cx: x(plan.predicted.memory_bytes), cy: y(plan.quality) };
  const budget = memory <= high && memory >= low ? x(memory) : null;
  const levels = [worst, (worst + best) / 2, best];
  return html`<figure class="front" ref=${place}>
    <svg width=${width} height=${HEIGHT} viewBox=${`0 0 ${width} ${HEIGHT}`} role="group"
      aria-label=${`${line.length} sizes from ${bytes(sizes.reduce((a, b) => Math.min(a, b)))} to ${bytes(sizes.reduce((a, b) => Math.max(a, b)))}; ${line.filter(kept).length} keep the budget`}>
      ${budget !== null && html`<rect class="beyond" x=${budget} y=${EDGE.top} width=${Math.max(0, width - EDGE.right - budget)} height=${HEIGHT - EDGE.top - EDGE.bottom} />
        <line class="budget" x1=${budget} x2=${budget} y1=${EDGE.top} y2=${HEIGHT - EDGE.bottom} />
        <text class="note" x=${budget + (budget > width * 0.7 ? -6 : 6)} y=${EDGE.top + 12} text-anchor=${budget > width * 0.7 ? "end" : "start"}>your budget</text>`}
      ${levels.map((level) => html`<line class="grid" x1=${EDGE.left} x2=${width - EDGE.right} y1=${y(level)} y2=${y(level)} />
        <text class="tick" x=${EDGE.left - 8} y=${y(level) + 4} text-anchor="end">${level.toFixed(2)}</text>`)}
      ${ticks(low, high, width < 500 ? 4 : 7).map((tick) => html`<text class="tick" x=${x(tick)} y=${HEIGHT - EDGE.bottom + 18} text-anchor="middle">${bytes(tick)}</text>`)}
      <text class="axis" x=${(width + EDGE.left) / 2} y=${HEIGHT - 6} text-anchor="middle">memory of the model</text>
      <text class="axis" transform=${`translate(12 ${(HEIGHT - EDGE.bottom) / 2}) rotate(-90)`} text-anchor="middle">quality</text>
      ${others.map((p) => html`<circle class="other" cx=${x(p.predicted.memory_bytes)} cy=${y(p.quality)} r="2" />`)}
      <polyline class="line" points=${line.map((p) => `${x(p.predicted.memory_bytes)},${y(p.quality)}`).join(" ")} />
      ${chosen && html`<circle class="chosen" ...${chosen} r="11" />`}
      ${line.map((p) => html`<circle class=${`point${kept(p) ? "" : " out"}`} cx=${x(p.predicted.memory_bytes)} cy=${y(p.quality)} r=${same(p) ? 6.5 : 4.5}
        style=${{ "--slow": slowness(p).toFixed(2) }} role="button" tabindex="0" onClick=${() => onPick(p)}
        onKeyDown=${(event) => (event.key === "Enter" || event.key === " ") && (event.preventDefault(), onPick(p))}
        aria-label=${`${size(p)}: ${bytes(p.predicted.memory_bytes)}, ${seconds(took(p))}, quality ${p.quality.toFixed(2)}`}>
        <title>${size(p)}: ${bytes(p.predicted.memory_bytes)}, ${seconds(took(p))}, quality ${p.quality.toFixed(2)}</title>
      </circle>`)}
    </svg>
    <figcaption class="quiet">
      <span class="mark"></span> best for its memory, stronger is slower: ${seconds(fast)} to ${seconds(slow)} ·
      <span class="mark chosen"></span> the plan ${others.length > 0 && html`· <span class="mark other"></span> faster, for more memory`} · click a point to take its budget
    </figcaption>
  </figure>`;
}
