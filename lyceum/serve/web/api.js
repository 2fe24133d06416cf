// The server, as functions. A key is asked for when the server wants one, and stays in this tab.

export class Refused extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

let askForKey = async () => null;

/** What to do when a key is needed: a function that gives one. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

function headers(hasBody) {
  const found = hasBody ? { "content-type": "application/json" } : {};
  const key = sessionStorage.getItem("key");
  return key ? { ...found, authorization: `Bearer ${key}` } : found;
}

/** An answer; throws Refused for what the server did not do. */
export async function send(method, path, body, more = {}) {
  for (;;) {
    const answer = await fetch(path, {
      method,
      headers: headers(body !== undefined),
      body: body === undefined ? undefined : JSON.stringify(body),
      cache: "no-store",
      ...more,
    });
    if (answer.status === 401) {
      const key = await askForKey();
      sessionStorage.setItem("key", key);
      continue;
    }
    if (!answer.ok) {
      const said = await answer.json().catch(() => ({}));
      throw new Refused(answer.status, said.error?.message ?? answer.statusText, said.error?.code);
    }
    return answer;
  }
}

/** An answer as JSON: json(method, path, body). */
export const json = async (...all) => (await send(...all)).json();
const id = encodeURIComponent;

export const start = () => json("GET", "/api/start");
export const list = (query, before) =>
  json("GET", `/api/conversations?query=${id(query)}${before ? `&before=${id(before)}` : ""}`);
export const create = (given) => json("POST", "/api/conversations", given);
export const open = (conversation) => json("GET", `/api/conversations/${id(conversation)}`);
export const change = (conversation, given) => json("PATCH", `/api/conversations/${id(conversation)}`, given);
export const remove = (conversation) => send("DELETE", `/api/conversations/${id(conversation)}`, undefined, { keepalive: true });
export const say = (conversation, given) => json("POST", `/api/conversations/${id(conversation)}/turns`, given);
export const again = (message, given) => json("POST", `/api/messages/${id(message)}/again`, given);
export const goOn = (message) => json("POST", `/api/messages/${id(message)}/continue`, {});
export const stop = (message) => json("POST", `/api/messages/${id(message)}/stop`, {});
export const thumb = (message, given) => json("POST", `/api/messages/${id(message)}/thumb`, given);
export const correct = (message, given) => json("POST", `/api/messages/${id(message)}/correction`, given);
export const compare = (given) => json("POST", "/api/comparisons", given);
export const pressed = (message, given) => json("POST", `/api/messages/${id(message)}/presses`, given);
export const taught = () => json("GET", "/api/teaching");
export const forgetTaught = (model) => json("DELETE", `/api/teaching/${id(model)}`);

export const bring = (given) => json("POST", "/api/account/import", given);
export const deleteAccount = () => json("DELETE", "/api/account");

/** Everything as a file. */
export async function downloadAccount() {
  return (await send("GET", "/api/account/export")).blob();
}

/** A conversation as a file. */
export async function download(conversation, format) {
  const answer = await send("GET", `/api/conversations/${id(conversation)}/export?format=${format}`);
  return answer.blob();
}

/** What comes of an answer under way, one object at a time, from the block number `blocks` on. Throws when the line breaks. */
export const follow = (message, blocks, signal) => events("GET", `/api/messages/${id(message)}/events?blocks=${blocks}`, undefined, signal);

/** The events of a stream as objects, until its end. Throws Refused for an event that is an error. */
export async function* events(method, path, body, signal) {
  const answer = await send(method, path, body, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const event of parts) {
      if (!event.startsWith("data: ") || event === "data: [DONE]") continue; // a ping, or the end
      const news = JSON.parse(event.slice(6));
      if (news.error) throw new Refused(news.error.code === "not_found" ? 404 : 500, news.error.message, news.error.code);
      yield news;
    }
  }
}
