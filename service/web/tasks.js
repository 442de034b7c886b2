// Tasks, which are images of other classes: to send, to look at, and to make models for.
import { html, useEffect, useState } from "./vendor/preact.js";
import { get, request } from "./api.js";
import { Figures, Problem } from "./parts.js";

const ARCHIVES = ".zip,.tar,.tar.gz,.tgz";

// Images of each class in the order of their numbers, and what was left out and why.
function Held({ of }) {
  return html`
    <ol start="0">${of.class_names.map((name, i) => html`<li>${name}: ${of.counts[i]}</li>`)}</ol>
    ${of.skipped.map(({ reason, count, examples }) => html`
      <p class="quiet">Skipped, ${reason}: ${count} (${examples.join(", ")}${count > examples.length ? ", …" : ""})</p>`)}`;
}

export function Tasks({ families }) {
  const [tasks, setTasks] = useState(null);
  const [problem, setProblem] = useState(null);
  const [busy, setBusy] = useState(false);
  const [looked, setLooked] = useState(null);

  async function attempt(work) {
    setProblem(null);
    try {
      await work();
      setTasks((await get("tasks")).tasks);
    } catch (error) {
      setProblem(error);
    }
  }
  useEffect(() => {
    attempt(() => {});
  }, []);

  async function send(event) {
    event.preventDefault();
    const form = event.target;
    const { archive, ...more } = Object.fromEntries(new FormData(form));
    const query = new URLSearchParams(Object.entries(more).filter(([, value]) => value));
    const dry = event.submitter?.value === "look";
    if (dry) query.set("dry_run", "true");
    setBusy(true);
    setLooked(null);
    await attempt(async () => {
      const made = await request("POST", `tasks?${query}`, archive);
      if (dry || made.skipped.length) setLooked({ ...made, dry });
      if (!dry) form.reset();
    });
    setBusy(false);
  }
  const remove = (task) =>
    confirm(`Delete ${task.name}? Models that were made for it stay.`) &&
    attempt(() => request("DELETE", `tasks/${task.id}`));

  return html`
    <h1>Tasks</h1>
    <p>Images of your own classes, in folders that are named after them: a model learns them in its Σ. A dataset that Hugging Face <code>datasets</code> has saved is sent by <code>fineserve tasks create FOLDER</code>.</p>
    <form onSubmit=${send}>
      <fieldset class="grid">
        <label>Archive, zip or tar <input type="file" name="archive" accept=${ARCHIVES} required /></label>
        <label>Name, optional <input type="text" name="name" /></label>
        ${families.length > 1 && html`<label>Family
          <select name="family">${families.map(({ name }) => html`<option value=${name}>${name}</option>`)}</select>
        </label>`}
      </fieldset>
      <div class="row">
        <button type="submit" disabled=${busy} aria-busy=${busy}>Send</button>
        <button type="submit" value="look" class="secondary outline" disabled=${busy}>Only look what is in it</button>
      </div>
    </form>
    <${Problem} of=${problem} />
    ${looked && html`<article role="status" aria-label="What is in it">
      <h2>${looked.dry ? "This is in it; nothing was kept" : `${looked.name} was made`}</h2>
      <${Held} of=${looked} />
    </article>`}
    ${tasks?.length === 0 && html`<p class="quiet">No task yet.</p>`}
    <div class="columns">${tasks?.map((task) => html`<article key=${task.id} aria-label=${task.name}>
      <h2>${task.name}</h2>
      <${Figures} of=${{
        classes: task.class_names.length,
        images: task.counts.reduce((sum, count) => sum + count, 0),
        family: task.family,
      }} />
      <img class="sheet" src=${`tasks/${task.id}/preview.png`} alt=${`Some images of each class of ${task.name}`} />
      <details>
        <summary>Images of each class</summary>
        <${Held} of=${task} />
      </details>
      <div class="row">
        <a role="button" href=${`#budgets/${task.id}`}>Make a model</a>
        <button class="secondary outline" onClick=${() => remove(task)}>Delete</button>
      </div>
    </article>`)}</div>`;
}
