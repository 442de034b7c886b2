// The HTTP API as this page uses it.

// Answer to a request; `body` is a file, or a value that is sent as JSON.
export async function request(method, path, body, headers = {}) {
  const json = body !== undefined && !(body instanceof Blob);
  const answer = await fetch(path, {
    method,
    headers: json ? { "content-type": "application/json", ...headers } : headers,
    body: json ? JSON.stringify(body) : body,
  });
  if (answer.status === 204) return null;
  if (answer.status === 401) dispatchEvent(new Event("unauthenticated"));
  const content = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(content.detail ?? answer.statusText), content);
  return content;
}

export const get = (path) => request("GET", path);
export const post = (path, body, headers) => request("POST", path, body, headers);

// Follow server-sent events by name; returns the function that stops it.
export function follow(path, listeners) {
  const source = new EventSource(path);
  for (const [name, listener] of Object.entries(listeners)) {
    source.addEventListener(name, (event) => listener(JSON.parse(event.data), event));
  }
  return () => source.close();
}

export const FINISHED = new Set(["ready", "undertrained", "done", "failed", "cancelled", "deleted"]);
