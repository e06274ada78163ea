// The page asks the server it came from, in OpenAI's form as any other client. What a model says is shown as text.
"use strict";

const at = (id) => document.getElementById(id);
const state = { run: null, picture: null, conversations: {}, key: sessionStorage.getItem("key") || "" };

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

async function ask(path, body) {
  const headers = { "Content-Type": "application/json" };
  if (state.key) headers.Authorization = `Bearer ${state.key}`;
  const options = body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("the server does not answer: is it still running?");
  }
  if (!answer.ok) {
    const said = await answer.json().catch(() => null);
    throw Object.assign(new Error(said?.error?.message || `error ${answer.status}`), { status: answer.status });
  }
  return answer;
}

function complain(error) {
  at("problem").textContent = error ? error.message : "";
  at("problem").hidden = !error;
}

// Looks at the run again and again: how far it is, and which arms have come. What the user typed and read stays.
async function follow() {
  let soon = 15000;
  try {
    const run = await (await ask("api/run")).json();
    if (!at("key").hidden) complain(null);
    at("key").hidden = true;
    progress(run);
    arrive(run);
    if (!run.progress.over || Object.keys(run.pending).length) soon = 2000;
  } catch (error) {
    if (error.status === 401) {
      if (state.key) complain(error);
      at("key").hidden = false;
      return;
    }
    at("progress").hidden = false;
    at("progress").className = "silent";
    at("words").textContent = error.message;
    soon = 5000;
  }
  setTimeout(follow, document.hidden ? 15000 : soon);
}

function progress(run) {
  const { state: how, words, arms } = run.progress;
  at("progress").hidden = false;
  at("progress").className = how;
  if (at("words").textContent !== words) at("words").textContent = words;
  const shown = JSON.stringify([how, arms]);
  if (state.stages === shown) return;
  state.stages = shown;
  at("stages").replaceChildren(...(how === "finished" ? [] : arms).map((arm) =>
    element("li", {}, arm.name, ...arm.stages.map((stage) => {
      const at = stage.state === "now" ? ` ${stage.step.toLocaleString("en")}${stage.steps ? ` / ${stage.steps.toLocaleString("en")}` : ""}` : "";
      return element("span", { className: stage.state, textContent: `${stage.name}${at}${stage.state === "done" ? " ✓" : ""}` });
    }))));
}

function arrive(run) {
  const before = state.run;
  state.run = run;
  at("run").textContent = run.run;
  document.title = `${run.run} - eim_jax`;
  at("report").hidden = false;
  const reasons = Object.values(run.pending).map((textContent) => element("li", { textContent }));
  at("nobody").hidden = run.arms.length > 0;
  at(run.arms.length ? "coming" : "pending").replaceChildren(...reasons);
  at("coming").hidden = !run.arms.length || !reasons.length;
  const known = new Set(before ? before.arms.map((arm) => arm.name) : []);
  const come = run.arms.filter((arm) => !known.has(arm.name));
  if (!come.length) return;
  at("most").max = Math.max(...run.arms.map((arm) => arm.most));
  if (!known.size) first();
  for (const arm of come) {
    const box = element("input", { type: "checkbox", value: arm.name, checked: true });
    const words = element("span", {}, arm.name, element("small", { textContent: arm.description || "" }));
    at("arms").append(element("label", {}, box, words));
  }
  at("arms").hidden = run.arms.length < 2;
}

// The form, when there is somebody to ask.
function first() {
  const { captions, decode } = state.run;
  at("ask-words").hidden = captions;
  at("send").textContent = captions ? "Caption" : "Ask";
  at("method").options[0].textContent = `as the run: ${decode.method}${decode.method === "beam" ? `, ${decode.beams}` : ""}`;
  at("top_p").value = decode.top_p;
  at("most").value = at("most").max;
  at("main").hidden = false;
}

function show(file) {
  if (!file) return;
  const reader = new FileReader();
  reader.onload = () => {
    state.picture = reader.result;
    at("picture").src = reader.result;
    at("picture").hidden = at("without").hidden = false;
    at("hint").hidden = true;
    restart();
  };
  reader.readAsDataURL(file);
}

function restart() {
  state.conversations = {};
  at("turns").replaceChildren();
  at("nearest").hidden = at("again").hidden = true;
  complain(null);
}

function settings() {
  const method = at("method").value;
  const chosen = { max_tokens: Number(at("most").value) };
  if (method === "greedy") chosen.temperature = 0;
  if (method === "beam") chosen.method = "beam";
  if (method === "nucleus") {
    chosen.temperature = Number(at("temperature").value);
    chosen.top_p = Number(at("top_p").value);
    chosen.seed = Number(at("seed").value);
  }
  return chosen;
}

// The turns before a question hold the picture in the first of them.
function messages(arm, question) {
  const parts = (words, pictured) => [
    ...(pictured && state.picture ? [{ type: "image_url", image_url: { url: state.picture } }] : []),
    ...(words ? [{ type: "text", text: words }] : []),
  ];
  const before = state.run.several_turns ? state.conversations[arm] || [] : [];
  const asked = [...before.map((turn) => turn.question), question];
  const said = asked.map((words, i) => [
    { role: "user", content: parts(words, i === 0) },
    ...(i < before.length ? [{ role: "assistant", content: before[i].answer }] : []),
  ]);
  return said.flat();
}

async function answer(arm, asked, into) {
  const body = { model: arm, messages: asked, stream: true, stream_options: { include_usage: true }, ...settings() };
  const reader = (await ask("v1/chat/completions", body)).body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "", text = "", reason = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (waiting + value).split("\n");
    waiting = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: {")) continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      text += chunk.choices[0]?.delta.content || "";
      reason = chunk.choices[0]?.finish_reason || reason;
      into.textContent = text;
    }
  }
  return { text, cut: reason === "length" };
}

// Each answer's mean negative log-likelihood a token, under every arm: the least of a row is the arm that expects it most.
async function likelihoods(answers) {
  const arms = answers.map(({ arm }) => arm);
  const rows = await Promise.all(
    answers.filter(({ text }) => text).map(async ({ arm, text }) => {
      const scored = arms.map(async (judge) => {
        const asked = answers.find((other) => other.arm === judge).asked;
        return (await (await ask("api/likelihood", { model: judge, messages: asked, text })).json()).nll;
      });
      return { arm, values: await Promise.all(scored) };
    }),
  );
  const head = element("tr", {}, element("th", { textContent: "answer of" }));
  head.append(...arms.map((arm) => element("th", { textContent: `under ${arm}` })));
  const table = element("table", {}, element("caption", { textContent: "Negative log-likelihood, nats a token" }), head);
  for (const { arm, values } of rows) {
    const cells = values.map((value) =>
      element("td", { textContent: value.toFixed(3), className: values.length > 1 && value === Math.min(...values) ? "best" : "" }));
    table.append(element("tr", {}, element("th", { textContent: arm }), ...cells));
  }
  return element("div", { className: "scroll" }, table);
}

async function nearest(arms) {
  if (!state.run.neighbours || !state.picture) return;
  const found = await Promise.all(arms.map(async (arm) => {
    const asked = [{ role: "user", content: [{ type: "image_url", image_url: { url: state.picture } }, ...(state.run.captions ? [] : [{ type: "text", text: "?" }])] }];
    return (await ask("api/neighbours", { model: arm, messages: asked })).json();
  }));
  const shown = found.flatMap(({ model, losses }) => losses.map((loss) => {
    const title = `${loss.loss} of ${model}: nearest of ${loss.rows.toLocaleString("en")} keys ${loss.queue}`;
    const samples = loss.nearest.map((sample) => element("figure", {},
      ...(sample.picture ? [element("img", { src: sample.picture, alt: "" })] : []),
      element("figcaption", { textContent: sample.text }),
      element("small", { textContent: `${loss.similarity} ${sample.similarity.toFixed(3)}, row ${sample.row}` })));
    return element("div", { className: "loss" }, element("h3", { textContent: title }),
      element("div", { className: "samples" }, ...samples));
  }));
  at("losses").replaceChildren(...shown);
  at("nearest").hidden = !shown.length;
}

async function send() {
  const { captions, several_turns } = state.run;
  const question = captions ? "" : at("question").value.trim();
  const arms = [...at("arms").querySelectorAll("input:checked")].map((box) => box.value);
  if (captions && !state.picture) return complain(new Error("Choose a picture first."));
  if (!captions && !question) return complain(new Error("Write a question first."));
  if (!arms.length) return complain(new Error("Choose an arm."));
  complain(null);
  const columns = element("div", { className: "columns" });
  const turn = element("article", { className: "turn" });
  if (question) turn.append(element("p", { className: "asked", textContent: question }));
  turn.append(columns);
  at("turns")[several_turns ? "append" : "prepend"](turn);
  const first = !Object.keys(state.conversations).length;
  const answers = await Promise.all(arms.map(async (arm) => {
    const words = element("p", { textContent: "…" }), note = element("small");
    columns.append(element("div", { className: "answer" }, element("h3", { textContent: arm }), words, note));
    const asked = messages(arm, question);
    try {
      const { text, cut } = await answer(arm, asked, words);
      if (!text) words.textContent = "(no words)";
      note.textContent = cut ? "cut at the most tokens" : "";
      (state.conversations[arm] ||= []).push({ question, answer: text });
      return { arm, asked, text };
    } catch (error) {
      words.textContent = error.message;
      words.className = "wrong";
      return null;
    }
  }));
  const good = answers.filter(Boolean);
  at("question").value = several_turns ? "" : at("question").value;
  at("again").hidden = !several_turns;
  if (good.some(({ text }) => text)) turn.append(await likelihoods(good));
  if (first) await nearest(arms);
}

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  at("send").disabled = true;
  try {
    await send();
  } catch (error) {
    complain(error);
  } finally {
    at("send").disabled = false;
  }
});
at("key").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = at("key").querySelector("input").value;
  sessionStorage.setItem("key", state.key);
  follow();
});
at("method").addEventListener("change", () => { at("sampling").hidden = at("method").value !== "nucleus"; });
at("file").addEventListener("change", () => show(at("file").files[0]));
at("drop").addEventListener("dragover", (event) => { event.preventDefault(); at("drop").classList.add("over"); });
at("drop").addEventListener("dragleave", () => at("drop").classList.remove("over"));
at("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  show(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => show(event.clipboardData.files[0]));
at("without").addEventListener("click", () => {
  state.picture = null;
  at("file").value = "";
  at("picture").hidden = at("without").hidden = true;
  at("hint").hidden = false;
  restart();
});
at("again").addEventListener("click", restart);
follow();
