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
const MOST_MOMENTS = 300;
// What the load chart draws of a status, by the worker that serves most.
function seen({ workers }) {
  const rates = workers.map(({ gauges }) => gauges.elastic_rate ?? 0);
  const busiest = workers[rates.indexOf(Math.max(0, ...rates))]?.gauges ?? {};
  const rate = rates.reduce((sum, each) => sum + each, 0);
  return { at: Date.now(), rate, depth: rate > 0 ? busiest.elastic_depth ?? null : null };
}

const address = () => location.hash.slice(1).split("/");

function App() {
  const [[view, id], setAddress] = useState(address());
  const [live, setLive] = useState({ models: [], images: {}, status: null });
  const [past, setPast] = useState([]);
  const [families, setFamilies] = useState([]);
  const [locked, setLocked] = useState(false);
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
      if (now.status) setPast((before) => [...before, seen(now.status)].slice(-MOST_MOMENTS));
    },
  }), []);
  useEffect(() => {
    get("families").then((answer) => setFamilies(answer.families), () => {});
  }, [familyNames]);

  async function signOut() {
    await request("DELETE", "session");
    location.reload();
  }

  if (locked) return html`<main class="container"><${SignIn} /></main>`;
  const name = view in VIEWS ? view : "budgets";
  const View = name === "models" && id ? Model : VIEWS[name];
  return html`
    <a class="skip" href="#main" onClick=${(event) => {
      event.preventDefault();
      document.querySelector("main").focus();
    }}>To the content</a>
    <header class="container">
      <nav aria-label="Views">
        <ul><li class="brand">fineserve</li></ul>
        <ul>
          ${Object.keys(VIEWS).map((other) => html`<li>
            <a href=${`#${other}`} aria-current=${other === name ? "page" : undefined}>
              ${other[0].toUpperCase() + other.slice(1)}
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
    <main class="container" id="main" tabindex="-1">
      <${View} key=${view === "models" && id} id=${id} live=${live} past=${past} families=${families} />
    </main>`;
}

const app = document.getElementById("app");
app.replaceChildren();
render(html`<${App} />`, app);
