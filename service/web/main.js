// The five views, by the part of the address after #.
import { html, render, useEffect, useState } from "./vendor/preact.js";
import { follow, get, request } from "./api.js";
import { Budgets } from "./budgets.js";
import { Health } from "./health.js";
import { Model, Models } from "./models.js";
import { Playground } from "./playground.js";
import { SignIn } from "./signin.js";
import { Tasks } from "./tasks.js";

const VIEWS = { budgets: Budgets, models: Models, playground: Playground, tasks: Tasks, health: Health };
const NAMES = { tasks: "Your images" };
const MOST_MOMENTS = 300;
const LOOK_MILLISECONDS = 2000;
// What the charts draw of a moment; of elastic requests, by the worker that serves most.
function seen({ workers, queues, active_generations: running }, images, before) {
  const sum = (name) => {
    const told = workers.map(({ gauges }) => gauges[name]).filter((value) => value !== undefined);
    return told.length ? told.reduce((a, b) => a + b) : null;
  };
  const made = Object.values(images).reduce((a, b) => a + b, 0);
  const passed = before ? (Date.now() - before.at) / 1000 : 0;
  const more = {
    made,
    waiting: queues.build + queues.sample + running,
    images: passed ? Math.max(0, made - before.made) / passed : null,
    held: sum("device_held_bytes"),
    resident: sum("process_resident_bytes"),
    compiled: workers.map(({ gauges }) => gauges.engine_compiled).find((value) => value !== undefined) ?? null,
  };
  const rates = workers.map(({ gauges }) => gauges.elastic_rate ?? 0);
  const busiest = workers[rates.indexOf(Math.max(0, ...rates))]?.gauges ?? {};
  const rate = rates.reduce((sum, each) => sum + each, 0);
  return { ...more, at: Date.now(), rate, depth: rate > 0 ? busiest.elastic_depth ?? null : null };
}

const address = () => {
  const [view, ...rest] = location.hash.slice(1).split("/");
  return [view, rest.join("/")];
};

function App() {
  const [[view, id], setAddress] = useState(address());
  const [live, setLive] = useState({ models: [], images: {}, status: null });
  const [past, setPast] = useState([]);
  const [families, setFamilies] = useState([]);
  const [locked, setLocked] = useState(false);
  const [gone, setGone] = useState(false);
  const familyNames = (live.status?.families ?? []).join();

  useEffect(() => {
    const changed = () => {
      setAddress(address());
      document.querySelector("main")?.focus();
    };
    addEventListener("hashchange", changed);
    addEventListener("unauthenticated", () => setLocked(true));
    return () => removeEventListener("hashchange", changed);
  }, []);
  useEffect(() => follow("status/events", {
    snapshot: (now) => {
      setLive((before) => (now.status ? now : { ...before, status: null, lost: true }));
      if (now.status) setPast((before) => [...before, seen(now.status, now.images, before.at(-1))].slice(-MOST_MOMENTS));
    },
  }), []);
  useEffect(() => {
    const timer = setInterval(async () => {
      const answered = await fetch("healthz", { signal: AbortSignal.timeout(LOOK_MILLISECONDS) }).then((answer) => answer.ok, () => false);
      setGone(!answered);
    }, LOOK_MILLISECONDS);
    return () => clearInterval(timer);
  }, []);
  useEffect(() => {
    get("families").then((answer) => setFamilies(answer.families), () => {});
  }, [familyNames, gone]);

  async function signOut() {
    await request("DELETE", "session");
    location.reload();
  }

  const name = view in VIEWS ? view : "budgets";
  useEffect(() => { // on a narrow screen it may be beyond the edge
    document.querySelector("nav [aria-current]")?.scrollIntoView({ inline: "center", block: "nearest" });
  }, [name]);

  if (locked) return html`<main class="container"><${SignIn} /></main>`;
  const View = name === "models" && id ? Model : VIEWS[name];
  return html`
    <a class="skip" href="#main" onClick=${(event) => {
      event.preventDefault();
      document.querySelector("main").focus();
    }}>To the content</a>
    <header class="container">
      <nav aria-label="Views">
        <ul><li class="brand"><a href="#budgets"><img src="page/icon.svg" alt="" width="26" height="26" /> <span>fineserve</span></a></li></ul>
        <ul>
          ${Object.keys(VIEWS).map((other) => html`<li>
            <a href=${`#${other}`} aria-current=${other === name ? "page" : undefined}>
              ${NAMES[other] ?? other[0].toUpperCase() + other.slice(1)}
            </a>
          </li>`)}
          <li><a href="docs">API</a></li>
          ${live.status?.caller && html`<li>
            <button class="plain" onClick=${signOut} title=${`${live.status.caller.key}: ${live.status.caller.scopes.join(", ")}`}>
              Sign out ${live.status.caller.owner}
            </button>
          </li>`}
        </ul>
      </nav>
    </header>
    ${gone && html`<p class="gone" role="alert">The service does not answer. This page looks again every two seconds, and goes on by itself.</p>`}
    <main class="container" id="main" tabindex="-1">
      <${View} key=${name === "models" && id} id=${id} live=${live} past=${past} families=${families} />
    </main>`;
}

const app = document.getElementById("app");
app.replaceChildren();
render(html`<${App} />`, app);
