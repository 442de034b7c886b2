// Tasks, which are images of other classes: to send, to look at, and to make models for.
import { html, useEffect, useState } from "./vendor/preact.js";
import { get, request } from "./api.js";
import { Figures, Problem } from "./parts.js";

const ARCHIVES = ".zip,.tar,.tar.gz,.tgz";

export function Tasks({ families }) {
  const [tasks, setTasks] = useState(null);
  const [problem, setProblem] = useState(null);
  const [busy, setBusy] = useState(false);

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
    setBusy(true);
    await attempt(async () => {
      await request("POST", `tasks?${query}`, archive);
      form.reset();
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
      <button type="submit" disabled=${busy} aria-busy=${busy}>Send</button>
    </form>
    <${Problem} of=${problem} />
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
        <ul>${task.class_names.map((name, i) => html`<li>${name}: ${task.counts[i]}</li>`)}</ul>
      </details>
      <div class="row">
        <a role="button" href=${`#budgets/${task.id}`}>Make a model</a>
        <button class="secondary outline" onClick=${() => remove(task)}>Delete</button>
      </div>
    </article>`)}</div>`;
}
