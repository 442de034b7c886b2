// Sign-in to a service with API keys; the key is kept where no script can read it.
import { html, useState } from "./vendor/preact.js";
import { post } from "./api.js";
import { Problem } from "./parts.js";

export function SignIn() {
  const [key, setKey] = useState("");
  const [problem, setProblem] = useState(null);

  async function signIn(event) {
    event.preventDefault();
    try {
      await post("session", { key: key.trim() });
      location.reload();
    } catch (error) {
      setProblem(error);
    }
  }

  return html`<div class="signin">
    <h1>API key</h1>
    <p>This service needs an API key. <code>fineserve keys create</code> makes one.</p>
    <form onSubmit=${signIn}>
      <label>Key
        <input type="password" required autocomplete="current-password" value=${key}
          onInput=${(event) => setKey(event.target.value)} />
      </label>
      <${Problem} of=${problem} />
      <button type="submit">Sign in</button>
    </form>
  </div>`;
}
