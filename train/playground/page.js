"use strict";
const $ = (name) => document.getElementById(name);
const percent = (p) => `${(100 * p).toFixed(1)}%`;
const visible = (text) =>
  text.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "…";
const running = {}; // pane -> what stops its answer
let models = null;
let baseAsked = ""; // prompt and length of the base's answer
let own = true; // whether the memory's own weight is asked for, not the slider's

function problem(place, sentence) {
  place.textContent = sentence || "";
  place.hidden = !sentence;
}

const memory = () => models.memories.find((each) => each.name === $("memory").value);

function ownWeight({ alpha, gate, by_context }) {
  if (typeof alpha === "number") return gate ? `at most ${alpha.toFixed(2)}` : alpha.toFixed(2);
  return by_context ? "by context" : "by its gate";
}

function showWeight() {
  const chosen = memory();
  if (own) $("alpha").value = typeof chosen.alpha === "number" ? chosen.alpha : 1;
  const number = Number($("alpha").value).toFixed(2);
  $("weight").textContent = own
    ? `${ownWeight(chosen)}, its own`
    : chosen.gate ? `at most ${number}` : number;
  $("own").hidden = own;
  $("mixture").querySelector("h2").textContent =
    `Base and ${chosen.name}, ${own ? ownWeight(chosen) : $("weight").textContent}`;
}

function showToken(span) {
  for (const each of document.querySelectorAll(".text .on")) each.classList.remove("on");
  span.classList.add("on");
  const told = span.told;
  const about = document.createElement("p");
  const code = document.createElement("code");
  code.textContent = visible(span.dataset.text);
  about.append(code);
  if (!told) {
    about.append(" Its probabilities are being asked for.");
    $("token").replaceChildren(about);
    return;
  }
  const who = document.createElement("span");
  who.className = "small";
  who.textContent = ` decided by: ${told.decided}` +
    (told.alpha === null ? "" : `, weight ${told.alpha.toFixed(2)}`);
  about.append(who);
  const table = document.createElement("table");
  for (const name of ["base", "memory", "mixture"]) {
    const row = table.insertRow();
    row.className = name;
    const head = document.createElement("th");
    head.textContent = name;
    row.append(head);
    const track = row.insertCell();
    track.className = "track";
    track.innerHTML = '<div class="bar"><div></div></div>';
    track.firstChild.firstChild.style.width = percent(told[name]);
    const p = row.insertCell();
    p.className = "p";
    p.textContent = percent(told[name]);
    const says = row.insertCell();
    says.className = "says small";
    says.textContent = `says ${visible(told.says[name])}`;
  }
  $("token").replaceChildren(about, table);
}

function written(pane, event) {
  const span = document.createElement("span");
  span.textContent = event.text || "…";
  span.dataset.text = event.text;
  span.classList.toggle("line", event.text.includes("\n")); // or it would not be seen
  span.tabIndex = 0;
  for (const name of ["mouseenter", "focus", "click"])
    span.addEventListener(name, () => showToken(span));
  pane.querySelector(".text").append(span);
}

function judged(pane, event) {
  const span = pane.querySelector(".text").children[event.at];
  span.told = event;
  span.title = event.numbers;
  span.dataset.decided = event.decided;
  span.style.background = event.shade;
  if (span.classList.contains("on")) showToken(span);
}

function ended(pane, event) {
  const spans = [...pane.querySelectorAll(".text span")];
  const last = spans.at(-1);
  if (event.done === "stop" && last && !last.dataset.text)
    last.textContent = last.dataset.text = "■";
  const count = spans.filter((span) => span.dataset.decided === "memory").length;
  const tokens = `${spans.length} token${spans.length === 1 ? "" : "s"}`;
  const who = pane.id === "base" ? "" : `, ${count} of them decided by the memory`;
  pane.querySelector(".said").textContent =
    `${tokens}${who}. ${event.done === "stop" ? "The text ends here." : "It would go on."}`;
}

function handle(pane, event) {
  if (event.error) problem(pane.querySelector(".problem"), event.error);
  else if ("done" in event) ended(pane, event);
  else if ("text" in event) written(pane, event);
  else judged(pane, event);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    yield* lines.map((line) => JSON.parse(line));
  }
}

const asked = () => `${$("tokens").value} ${$("prompt").value}`;

async function answer(name) {
  if (name === "base") baseAsked = asked();
  running[name]?.abort();
  const stop = (running[name] = new AbortController());
  const pane = $(name);
  pane.querySelector(".text").replaceChildren();
  pane.querySelector(".said").textContent = "\u00a0";
  problem(pane.querySelector(".problem"), "");
  pane.classList.add("writing");
  showButton();
  try {
    const response = await fetch("answer", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        prompt: $("prompt").value,
        writes: name,
        memory: $("memory").value,
        alpha: own ? null : Number($("alpha").value),
        tokens: Number($("tokens").value),
      }),
      signal: stop.signal,
    });
    if (response.ok) for await (const event of events(response)) handle(pane, event);
    else handle(pane, await response.json());
  } catch (error) {
    if (error.name !== "AbortError")
      handle(pane, { error: "The playground has ended: run memdec playground again." });
  }
  if (running[name] !== stop) return; // another answer is written here by now
  delete running[name];
  pane.classList.remove("writing");
  showButton();
}

function showButton() {
  $("write").textContent = Object.keys(running).length ? "Stop" : "Write";
}

function write() {
  $("token").replaceChildren(...[document.createElement("p")]);
  $("token").firstChild.textContent = "Point at a token, or tap it, for its probabilities.";
  for (const name of ["base", "mixture"]) answer(name);
}

function writeMixture() {
  showWeight();
  if (!$("prompt").value || !$("ask").checkValidity()) return;
  answer("mixture");
  if (baseAsked !== asked()) answer("base"); // else its text stays: it knows no memory, no weight
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const stops = Object.values(running);
  if (stops.length) for (const stop of stops) stop.abort();
  else write();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
$("alpha").addEventListener("input", () => {
  own = false;
  showWeight();
});
$("alpha").addEventListener("change", writeMixture);
$("own").addEventListener("click", () => {
  own = true;
  writeMixture();
});
$("memory").addEventListener("change", () => {
  own = true;
  writeMixture();
});

async function start() {
  let told;
  try {
    told = await (await fetch("models")).json();
  } catch {
    told = { error: "The playground has ended: run memdec playground again." };
  }
  if (told.error) {
    $("about").textContent = "";
    problem($("problem"), `${told.error} Then load this page again.`);
    return;
  }
  models = told;
  $("about").textContent = `${models.base} at ${models.server}`;
  $("memory").replaceChildren(...models.memories.map((each) => new Option(each.name)));
  $("tokens").max = models.max_model_len - 1;
  $("write").disabled = false;
  showWeight();
}

start();
