// Health of the service at a glance: whether it is ready, its load, its last failures.
import { html, useEffect, useState } from "./vendor/preact.js";
import { Chart, Figures, Problem, Sparkline, Table, ago, bytes, moment, share } from "./parts.js";

export function Health({ live, past }) {
  const { status } = live;
  if (live.lost) {
    return html`<h1>Health</h1><${Problem} of="Redis cannot be reached, so no new work is accepted; accepted work is kept." />`;
  }
  if (!status) return html`<h1>Health</h1><p aria-busy="true">Asking …</p>`;
  return html`
    <h1>Health</h1>
    <p aria-live="polite">${status.missing.length
      ? html`<strong class="state failed">Not ready</strong>: missing ${status.missing.join(", ")}`
      : html`<strong class="state ready">Ready</strong>: a budget sent now becomes images`}</p>
    <${Figures} of=${{
      "waiting to be built": status.queues.build,
      "waiting to be sampled": status.queues.sample,
      "builds under way": status.active_models,
      "generations under way": status.active_generations,
      "last contact": html`<${Contact} at=${past.at(-1)?.at} />`,
      "held by Redis": bytes(status.redis_memory_bytes),
      "free for artifacts": bytes(status.store_disk_free_bytes),
    }} />
    <div class="sparks">
      <${Sparkline} label="waiting and running" values=${past.map(({ waiting }) => waiting)} format=${count} />
      <${Sparkline} label="images a second" values=${past.map(({ images }) => images)} format=${(v) => (v === null ? "–" : v.toFixed(1))} />
      <${Sparkline} label="device memory" values=${past.map(({ held }) => held)} format=${bytes} />
      <${Sparkline} label="memory of the workers" values=${past.map(({ resident }) => resident)} format=${bytes} />
      <${Sparkline} label="kernels compiled" values=${past.map(({ compiled }) => compiled)} format=${(v) => (v === null ? "–" : share(v))} />
    </div>
    <p class="quiet">Since this page was opened; <a href="metrics">Prometheus' metrics</a> go further back.</p>
    <h2>Workers</h2>
    <${Table} label="Workers"
      columns=${["queue", "process", "device", "models there", "device memory, held · budget", "running · waiting", "compiled", "resident"]}
      rows=${status.workers.map(({ queue, name, device_class, gauges, problem }) => [
        queue,
        html`<span>${name}${problem && html`<br /><small>${problem}</small>`}</span>`,
        device_class,
        gauges.engine_models ?? "–",
        gauges.device_budget_bytes === undefined ? "–" : `${bytes(gauges.device_held_bytes)} · ${bytes(gauges.device_budget_bytes)}`,
        gauges.engine_running === undefined ? "–" : `${gauges.engine_running} · ${gauges.engine_waiting}`,
        share(gauges.engine_compiled),
        bytes(gauges.process_resident_bytes),
      ])} />
    <${Elastic} past=${past} />
    <h2>Device profiles</h2>
    <${Table} label="Device profiles"
      columns=${["family", "device", "latency", "since", "corrected by models", "by a factor of"]}
      rows=${status.profiles.map((profile) => [
        profile.family,
        profile.device_class,
        profile.estimated ? "estimated, until nobody asks for images" : "measured",
        ago(profile.measured_at),
        profile.observations,
        profile.speed_correction.toFixed(2),
      ])} />
    <h2>Last failures</h2>
    ${status.failures.length
      ? html`<ul>${status.failures.map((failure) => html`<li>
          <span class="quiet">${moment(failure.at)}</span> ${failure.kind} ${failure.kind === "model" ? html`<a href=${`#models/${failure.id}`}><code>${failure.id}</code></a>` : html`<code>${failure.id}</code>`}:
          ${failure.error}</li>`)}</ul>`
      : html`<p class="quiet">None.</p>`}
    <p><a href="metrics">Metrics for Prometheus</a> · <a href="docs">API</a></p>`;
}

const count = (value) => (value === null ? "–" : String(value));

// Seconds since the service said something.
function Contact({ at }) {
  const [, tick] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => tick((n) => n + 1), 1000);
    return () => clearInterval(timer);
  }, []);
  const passed = at && Math.max(0, Math.round((Date.now() - at) / 1000));
  return at ? (passed ? `${passed} s ago` : "now") : "–";
}

// How deep elastic requests are served while this page is open: a crowd makes it sink, and it rises again.
function Elastic({ past }) {
  if (!past.some(({ depth }) => depth !== null)) return null;
  const now = past.at(-1).at;
  const ago = past.map(({ at }) => (at - now) / 1000);
  return html`
    <h2>Elastic requests</h2>
    <${Chart} label="Depth that elastic requests were served by, and requests a second, since this page was opened"
      series=${[{ label: "depth served", line: true }, { label: "requests a second", line: true, faint: true }]}
      data=${[ago, past.map(({ depth }) => depth), past.map(({ rate }) => rate)]}
      x=${{ title: "seconds ago", format: (value) => `${Math.round(-value)}` }}
      y=${{ title: "", format: (value) => value.toFixed(0) }} />`;
}
