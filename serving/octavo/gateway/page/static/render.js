// Text of a model to elements: paragraphs, code blocks, inline code, bold. Only createElement and text nodes, never HTML.
import { words } from "./words.js";

const INLINE = /(`[^`\n]+`|\*\*[^*\n]+\*\*)/;

export function render(target, text) {
  const pieces = text.split(/^```/m);
  const made = [];
  pieces.forEach((piece, at) => {
    if (at % 2 === 0) {
      const plain = piece.replace(/^\n+|\n+$/g, "");
      if (plain) made.push(prose(plain));
    } else {
      made.push(code(piece));
    }
  });
  target.replaceChildren(...made);
}

function prose(text) {
  const paragraph = document.createElement("div");
  paragraph.className = "prose";
  for (const part of text.split(INLINE)) {
    if (part.length > 2 && part.startsWith("`") && part.endsWith("`")) {
      paragraph.append(element("code", part.slice(1, -1)));
    } else if (part.length > 4 && part.startsWith("**") && part.endsWith("**")) {
      paragraph.append(element("strong", part.slice(2, -2)));
    } else if (part) {
      paragraph.append(document.createTextNode(part));
    }
  }
  return paragraph;
}

function code(piece) {
  const end = piece.indexOf("\n");
  const text = end < 0 ? "" : piece.slice(end + 1).replace(/\n$/, "");
  const block = element("div", "");
  block.className = "code";
  const copy = element("button", words().copy);
  copy.type = "button";
  copy.className = "quiet copy";
  copy.dataset.copy = "";
  const pre = document.createElement("pre");
  pre.tabIndex = 0;
  pre.append(element("code", text));
  block.append(pre, copy);
  return block;
}

export function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}
