// Health of the service at a glance: whether it is ready, its load, its last failures.
import { html } from "./vendor/preact.js";
import { Chart, Figures, Problem, State, bytes, moment, share } from "./parts.js";

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
      "held by Redis": bytes(status.redis_memory_bytes),
      "free for artifacts": bytes(status.store_disk_free_bytes),
    }} />
    <h2>Workers</h2>
    <div class="overflow-auto" tabindex="0" role="region" aria-label="Workers"><table>
      <thead><tr><th scope="col">queue</th><th scope="col">process</th><th scope="col">device</th>
        <th scope="col">models there</th><th scope="col">device memory, held · budget</th>
        <th scope="col">running · waiting</th><th scope="col">compiled</th><th scope="col">resident</th></tr></thead>
      <tbody>${status.workers.map(({ queue, name, device_class, gauges, problem }) => html`<tr key=${name}>
        <th scope="row">${queue}</th><td>${name}${problem && html`<br /><small>${problem}</small>`}</td><td>${device_class}</td>
        <td>${gauges.engine_models ?? "–"}</td>
        <td>${bytes(gauges.device_held_bytes)} · ${bytes(gauges.device_budget_bytes)}</td>
        <td>${gauges.engine_running ?? "–"} · ${gauges.engine_waiting ?? "–"}</td>
        <td>${share(gauges.engine_compiled)}</td>
        <td>${bytes(gauges.process_resident_bytes)}</td>
      </tr>`)}</tbody>
    </table></div>
    <${Elastic} past=${past} />
    <h2>Device profiles</h2>
    <div class="overflow-auto" tabindex="0" role="region" aria-label="Device profiles"><table>
      <thead><tr><th scope="col">family</th><th scope="col">device</th><th scope="col">latency</th>
        <th scope="col">since</th><th scope="col">corrected by models</th><th scope="col">by a factor of</th></tr></thead>
      <tbody>${status.profiles.map((profile) => html`<tr key=${profile.family + profile.device_class}>
        <th scope="row">${profile.family}</th><td>${profile.device_class}</td>
        <td>${profile.estimated ? "estimated, until nobody asks for images" : "measured"}</td>
        <td>${new Date(profile.measured_at).toLocaleString()}</td><td>${profile.observations}</td>
        <td>${profile.speed_correction.toFixed(2)}</td>
      </tr>`)}</tbody>
    </table></div>
    <h2>Last failures</h2>
    ${status.failures.length
      ? html`<ul>${status.failures.map((failure) => html`<li>
          <span class="quiet">${moment(failure.at)}</span> ${failure.kind} <code>${failure.id}</code>:
          ${failure.error}</li>`)}</ul>`
      : html`<p class="quiet">None.</p>`}
    <p><a href="metrics">Metrics for Prometheus</a> · <a href="docs">API</a></p>`;
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
