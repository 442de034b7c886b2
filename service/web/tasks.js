// Images of other classes ("tasks" in the API): to send, to look at, and to make models for.
import { html, useEffect, useRef, useState } from "./vendor/preact.js";
import { get, request } from "./api.js";
import { drawn, files, packed } from "./pack.js";
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
  const [folder, setFolder] = useState(null); // {name, archive, classes}
  const [over, setOver] = useState(false);
  const form = useRef();

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

  async function take(name, found) {
    setProblem(null);
    setLooked(null);
    const counts = {};
    for (const { path } of found) counts[path.split("/").at(-2) ?? ""] = (counts[path.split("/").at(-2) ?? ""] ?? 0) + 1;
    if (!found.length) return setProblem("There are no pictures in that.");
    if (counts[""]) return setProblem("Put the pictures into folders, one for each class, and drop the folder that has them.");
    return setFolder({ name, counts, archive: await packed(found) });
  }
  async function dropped(event) {
    event.preventDefault();
    setOver(false);
    const [first] = event.dataTransfer.files;
    if (event.dataTransfer.files.length === 1 && ARCHIVES.split(",").some((end) => first.name.endsWith(end))) {
      return setFolder({ name: first.name.split(".")[0], counts: null, archive: first });
    }
    return attempt(async () => take("dropped", await files([...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()))));
  }

  async function send(event) {
    event.preventDefault();
    const { archive, ...more } = Object.fromEntries(new FormData(form.current));
    const content = folder?.archive ?? archive;
    if (!content?.size) return setProblem("Choose an archive, or drop a folder.");
    const query = new URLSearchParams(Object.entries(more).filter(([, value]) => value));
    if (folder && !query.get("name")) query.set("name", folder.name);
    const dry = event.submitter?.value === "look";
    if (dry) query.set("dry_run", "true");
    setBusy(true);
    setLooked(null);
    await attempt(async () => {
      const made = await request("POST", `tasks?${query}`, content);
      if (dry || made.skipped.length) setLooked({ ...made, dry });
      if (!dry) {
        form.current.reset();
        setFolder(null);
      }
    });
    return setBusy(false);
  }
  const remove = (task) =>
    confirm(`Delete ${task.name}? Models that were made for it stay.`) &&
    attempt(() => request("DELETE", `tasks/${task.id}`));

  return html`
    <h1>Your images</h1>
    <p class="lead">Give it a folder of pictures for each class: a model then draws your classes instead of the family's. A few dozen of each are enough to see it; learning them takes one to ten minutes.</p>
    <form ref=${form} onSubmit=${send} class="panel">
      <div class=${`drop${over ? " over" : ""}`} onDragOver=${(event) => (event.preventDefault(), setOver(true))} onDragLeave=${() => setOver(false)} onDrop=${dropped}>
        ${folder
          ? html`<strong>${folder.name}</strong>
            <span>${folder.counts ? Object.entries(folder.counts).map(([name, count]) => `${name}: ${count}`).join(" · ") : "an archive"}</span>
            <button type="button" class="small" onClick=${() => setFolder(null)}>Take it back</button>`
          : html`<strong>Drop a folder here</strong>
            <span class="row tight">
              <label class="small button">Choose a folder <input class="hidden" type="file" webkitdirectory multiple aria-label="Folder"
                onChange=${(event) => take(event.target.files[0]?.webkitRelativePath.split("/")[0] ?? "folder", [...event.target.files].map((file) => ({ path: file.webkitRelativePath, file })))} /></label>
              <button type="button" class="small" onClick=${() => attempt(async () => take("shapes", drawn()))}>Try it with drawn shapes</button>
            </span>`}
      </div>
      <fieldset class="grid">
        ${!folder && html`<label>Or an archive, zip or tar <input type="file" name="archive" aria-label="Archive" accept=${ARCHIVES} /></label>`}
        <label>Name, optional <input type="text" name="name" /></label>
        ${families.length > 1 && html`<label>Family
          <select name="family"><option value="">the service's default</option>${families.map(({ name }) => html`<option value=${name}>${name}</option>`)}</select>
        </label>`}
      </fieldset>
      <div class="row">
        <button type="submit" disabled=${busy} aria-busy=${busy}>Send</button>
        <button type="submit" value="look" class="secondary outline" disabled=${busy}>Only look at what is in it</button>
      </div>
      <p class="quiet">A dataset that Hugging Face <code>datasets</code> has saved is sent by <code>fineserve tasks create FOLDER</code>.</p>
    </form>
    <${Problem} of=${problem} />
    ${looked && html`<article role="status" aria-label="What is in it">
      <h2>${looked.dry ? "This is in it; nothing was kept" : `${looked.name} was made`}</h2>
      <${Held} of=${looked} />
    </article>`}
    ${tasks?.length === 0 && html`<p class="quiet">None yet.</p>`}
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
