// Renews the report while its run goes on: the place that is read, open details and the checkbox stay as they are.
"use strict";

const shown = { version: document.querySelector('meta[name="version"]').content };
const words = document.createElement("p");
words.id = "progress";
words.setAttribute("role", "status");
words.style.margin = "0 0 .75rem";
document.querySelector("header").prepend(words);

// Headings and details by their words and their number among those of the same words.
function named(nodes, words) {
  const seen = {};
  return [...nodes].map((node) => {
    const text = words(node);
    seen[text] = (seen[text] || 0) + 1;
    return [`${text} ${seen[text]}`, node];
  });
}
const headings = () => named(document.querySelectorAll("main h2, main h3, main h4"), (node) => node.tagName + node.textContent);
const details = () => named(document.querySelectorAll("details"), (node) => node.querySelector("summary").textContent);
const inputs = () => named(document.querySelectorAll("input"), (node) => node.id);

function renew(page) {
  const read = headings().filter(([, node]) => node.getBoundingClientRect().top < innerHeight / 2).pop();
  const top = read && read[1].getBoundingClientRect().top;
  const open = new Map(details().map(([name, node]) => [name, node.open]));
  const ticked = new Map(inputs().map(([name, node]) => [name, node.checked]));
  const aside = [...document.querySelectorAll(".scroll")].map((node) => node.scrollLeft);
  for (const part of ["header", "main", "footer"]) {
    document.querySelector(part).replaceChildren(...page.querySelector(part).childNodes);
  }
  document.querySelector("header").prepend(words);
  document.title = page.title;
  for (const [name, node] of details()) node.open = open.get(name) ?? node.open;
  for (const [name, node] of inputs()) node.checked = ticked.get(name) ?? node.checked;
  document.querySelectorAll(".scroll").forEach((node, i) => { node.scrollLeft = aside[i] || 0; });
  const again = read && new Map(headings()).get(read[0]);
  if (again && scrollY) scrollBy({ top: again.getBoundingClientRect().top - top, behavior: "instant" });
}

async function follow() {
  let soon = 30000;
  try {
    const answer = await fetch("report/state");
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    const now = await answer.json();
    words.textContent = now.words;
    if (!now.over) soon = 3000;
    if (now.version !== shown.version && getSelection().isCollapsed) {
      const text = await (await fetch("report")).text();
      const page = new DOMParser().parseFromString(text, "text/html");
      const meta = page.querySelector('meta[name="version"]');
      if (meta) {
        renew(page);
        shown.version = meta.content;
      }
    }
  } catch (error) {
    words.textContent = error instanceof TypeError ? "this page does not follow the run any more: the server does not answer" : error.message;
    soon = 5000;
  }
  setTimeout(follow, soon);
}
follow();
