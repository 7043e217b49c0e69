"use strict";
// Markdown as models write it, as nodes of the page: CommonMark's blocks and spans, GitHub's tables and
// strikethrough, and a line break where the text has one. HTML stays text, and images stay links, so that
// nothing is loaded and no answer can run anything. An unfinished text is shown as far as it goes.

const renderMarkdown = (() => {
  const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
  const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$/;
  const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
  const QUOTE = /^ {0,3}> ?/;
  const ITEM = /^( *)([-+*]|\d{1,9}[.)])( +|$)/;
  const DIVIDER = /^ *\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/;
  const MOST_LEVELS = 24;  // of quotes and lists in one another; deeper ones are text
  const isBlank = line => !line.trim();

  function element(tag, children = [], properties = {}) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  }

  // ---- blocks: each reader takes the lines from `start` on, and returns [node, next line]

  function readFence(lines, start) {
    const [, marker, info] = FENCE.exec(lines[start]);
    const indent = /^ */.exec(lines[start])[0].length;
    const closing = new RegExp(`^ {0,3}${marker[0]}{${marker.length},}[ \\t]*$`);
    const code = [];
    let next = start + 1;
    for (; next < lines.length && !closing.test(lines[next]); next++)
      code.push(lines[next].replace(new RegExp(`^ {0,${indent}}`), ""));
    const text = code.length ? `${code.join("\n")}\n` : "";
    const node = element("pre", [element("code", [text])]);
    node.dataset.language = info.trim().split(/\s/)[0];
    return [node, Math.min(next + 1, lines.length)];
  }

  function readQuote(lines, start, level) {
    const inner = [];
    let next = start;
    for (; next < lines.length && QUOTE.test(lines[next]); next++)
      inner.push(lines[next].replace(QUOTE, ""));
    return [element("blockquote", readBlocks(inner, level + 1)), next];
  }

  function readList(lines, start, level) {
    const first = ITEM.exec(lines[start]);
    const isOrdered = /\d/.test(first[2]);
    const kind = first[2].at(-1);  // another mark begins another list
    const items = [];
    let isLoose = false, next = start;
    while (next < lines.length) {
      const mark = ITEM.exec(lines[next]);
      if (!mark || mark[2].at(-1) !== kind || RULE.test(lines[next]) || mark[1].length > first[1].length + 1) break;
      // Five spaces or more behind a mark are code's; the text then begins one behind it.
      const spaces = mark[3].length > 4 || !mark[3].length ? 1 : mark[3].length;
      const indent = mark[1].length + mark[2].length + spaces;
      const item = [lines[next].slice(indent)];
      next++;
      while (next < lines.length) {
        const line = lines[next];
        const isInside = /^ */.exec(line)[0].length >= indent && !isBlank(line);
        const follows = isBlank(line) && next + 1 < lines.length && !isBlank(lines[next + 1])
          && /^ */.exec(lines[next + 1])[0].length >= indent;
        // A paragraph goes on without indentation, up to what begins something else.
        const isLazy = !isBlank(line) && !isBlank(item.at(-1)) && !ITEM.test(line)
          && !beginsBlock(lines, next);
        if (!isInside && !follows && !isLazy) break;
        item.push(isInside ? line.slice(indent) : isBlank(line) ? "" : line.trimStart());
        next++;
      }
      if (item.some((line, place) => isBlank(line) && place && place < item.length - 1
          && !isInsideFence(item, place))) isLoose = true;
      items.push(item);
      let after = next;
      while (after < lines.length && isBlank(lines[after])) after++;
      const more = after < lines.length && ITEM.exec(lines[after]);
      if (after > next && more && more[2].at(-1) === kind && more[1].length <= first[1].length + 1) {
        isLoose = true;
        next = after;
      }
    }
    const nodes = items.map(item => element("li", readBlocks(item, level + 1, !isLoose)));
    const list = element(isOrdered ? "ol" : "ul", nodes);
    const number = parseInt(first[2], 10);
    if (isOrdered && number !== 1) list.start = number;
    return [list, next];
  }

  function isInsideFence(lines, place) {
    let marker = null;
    for (const line of lines.slice(0, place)) {
      const fence = FENCE.exec(line);
      if (!marker && fence) marker = fence[1];
      else if (marker && line.trim().startsWith(marker)) marker = null;
    }
    return Boolean(marker);
  }

  function splitRow(line) {
    const cells = [];
    let cell = "";
    const text = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
    for (let i = 0; i < text.length; i++) {
      if (text[i] === "\\" && text[i + 1] === "|") { cell += "|"; i++; }
      else if (text[i] === "|") { cells.push(cell.trim()); cell = ""; }
      else cell += text[i];
    }
    return [...cells, cell.trim()];
  }

  const beginsTable = (lines, start) => lines[start].includes("|") && start + 1 < lines.length
    && DIVIDER.test(lines[start + 1]) && splitRow(lines[start]).length === splitRow(lines[start + 1]).length;

  function readTable(lines, start) {
    const columns = splitRow(lines[start]);
    const sides = splitRow(lines[start + 1]).map(mark =>
      mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : mark.startsWith(":") ? "left" : "");
    const makeRow = (cells, tag) => element("tr", columns.map((_, column) => {
      const node = element(tag, readSpans(cells[column] || ""));
      node.style.textAlign = sides[column];
      return node;
    }));
    const rows = [];
    let next = start + 2;
    for (; next < lines.length && !isBlank(lines[next]) && !beginsOther(lines[next]); next++)
      rows.push(makeRow(splitRow(lines[next]), "td"));
    const head = element("thead", [makeRow(columns, "th")]);
    const parts = rows.length ? [head, element("tbody", rows)] : [head];
    return [element("div", [element("table", parts)], {className: "table"}), next];
  }

  const beginsOther = line => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);

  function beginsBlock(lines, place) {
    const line = lines[place], item = ITEM.exec(line);
    // In a paragraph "1986. A year" is no list unless it is the first of one.
    const beginsList = item && item[3] && (/^[-+*]$/.test(item[2]) || parseInt(item[2], 10) === 1);
    return beginsOther(line) || Boolean(beginsList) || beginsTable(lines, place);
  }

  function readParagraph(lines, start, isTight) {
    let next = start + 1;
    while (next < lines.length && !isBlank(lines[next]) && !beginsBlock(lines, next)) next++;
    const spans = readSpans(lines.slice(start, next).map(line => line.trim()).join("\n"));
    return [isTight ? spans : element("p", spans), next];
  }

  function readBlocks(lines, level = 0, isTight = false) {
    const isDeep = level >= MOST_LEVELS;
    const nodes = [];
    let place = 0;
    while (place < lines.length) {
      const line = lines[place];
      if (isBlank(line)) { place++; continue; }
      let node;
      if (FENCE.test(line)) [node, place] = readFence(lines, place);
      else if (HEADING.test(line)) {
        const [, marks, title] = HEADING.exec(line);
        [node, place] = [element(`h${marks.length}`, readSpans((title || "").trim())), place + 1];
      }
      else if (RULE.test(line)) [node, place] = [element("hr"), place + 1];
      else if (QUOTE.test(line) && !isDeep) [node, place] = readQuote(lines, place, level);
      else if (ITEM.test(line) && !isDeep) [node, place] = readList(lines, place, level);
      else if (beginsTable(lines, place)) [node, place] = readTable(lines, place);
      else [node, place] = readParagraph(lines, place, isTight);
      nodes.push(...[node].flat());
    }
    return nodes;
  }

  // ---- spans: each reader looks at the start of a rest, and returns [node, length] or null

  const ENTITY = /^&(?:#(\d{1,7})|#[xX]([\da-fA-F]{1,6})|(\w{1,8}));/;
  const ENTITIES = {amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", ndash: "–", mdash: "—",
    hellip: "…", copy: "©"};
  const ESCAPE = /^\\([!-/:-@[-`{-~])/;
  const LINK = /^!?\[((?:\\.|\[[^\]]*\]|[^[\]\\])*)\]\(\s*<?((?:[^\s()<>\\]|\\.|\([^\s()]*\))*)>?(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/;
  const ADDRESS = /^<?(https?:\/\/[^\s<>]+)>?/;
  const SAFE = /^(?:https?:|mailto:)/i;

  function readEntity(rest) {
    const match = ENTITY.exec(rest);
    if (!match) return null;
    const code = match[1] ? parseInt(match[1], 10) : match[2] ? parseInt(match[2], 16) : null;
    const isCharacter = code > 0 && code <= 0x10ffff;
    const text = code === null ? ENTITIES[match[3]] : isCharacter ? String.fromCodePoint(code) : "\ufffd";
    return text ? [text, match[0].length] : null;
  }

  function readCode(rest) {
    const marks = /^`+/.exec(rest)?.[0];
    if (!marks) return null;
    const end = new RegExp(`(?<!\`)${marks}(?!\`)`, "g");
    end.lastIndex = marks.length;
    const close = end.exec(rest);
    if (!close) return [marks, marks.length];
    const text = rest.slice(marks.length, close.index).replaceAll("\n", " ");
    const isPadded = /^ .* $/.test(text) && text.trim();
    return [element("code", [isPadded ? text.slice(1, -1) : text]), close.index + marks.length];
  }

  function makeLink(children, address) {
    if (!SAFE.test(address)) return element("span", children);
    return element("a", children, {href: address, target: "_blank", rel: "noopener noreferrer"});
  }

  function readLink(rest) {
    const match = LINK.exec(rest);
    if (!match) return null;
    const address = match[2].replace(/\\(.)/g, "$1");
    return [makeLink(readSpans(match[1] || address), address), match[0].length];
  }

  function readAddress(rest, before) {
    const match = /[\w/]/.test(before) ? null : ADDRESS.exec(rest);
    if (!match) return null;
    const isBracketed = match[0].endsWith(">");
    // A sentence's point behind an address is not of it, nor a bracket that it does not open.
    let address = isBracketed ? match[1] : match[1].replace(/[.,;:!?*_~'"]+$/, "");
    if (!address.includes("(")) address = address.replace(/\).*$/, "");
    return [makeLink([address], address), isBracketed ? match[0].length : address.length];
  }

  function readEmphasis(rest, before) {
    const marks = /^(?:\*{1,3}|_{1,3}|~~)/.exec(rest)?.[0];
    if (!marks) return null;
    const mark = marks[0];
    const inside = rest.slice(marks.length);
    if (!inside || /^\s/.test(inside) || (mark === "_" && /\w/.test(before))) return null;
    const escaped = mark === "~" ? "~" : `\\${mark}`;
    const tail = mark === "_" ? "(?!\\w)" : "";
    const end = new RegExp(`(?<![\\s\\\\${escaped}])${escaped}{${marks.length}}(?!${escaped})${tail}`, "g");
    let close = end.exec(inside);
    while (close && isInsideCode(inside, close.index)) close = end.exec(inside);
    if (!close) return null;
    const children = readSpans(inside.slice(0, close.index));
    const length = close.index + 2 * marks.length;
    if (mark === "~") return [element("s", children), length];
    if (marks.length === 3) return [element("em", [element("strong", children)]), length];
    return [element(marks.length === 2 ? "strong" : "em", children), length];
  }

  const isInsideCode = (text, place) => (text.slice(0, place).match(/`/g) || []).length % 2 === 1;

  function readSpans(text) {
    const nodes = [];
    let plain = "";
    const flush = () => { if (plain) nodes.push(plain); plain = ""; };
    for (let place = 0; place < text.length;) {
      const stop = text.slice(place).search(/[\\`!\[<*_~&\n]|https?:/);
      if (stop < 0) { plain += text.slice(place); break; }
      plain += text.slice(place, place + stop);
      place += stop;
      const rest = text.slice(place), before = text[place - 1] || "";
      const escape = ESCAPE.exec(rest);
      if (escape) { plain += escape[1]; place += 2; continue; }
      const entity = readEntity(rest);
      if (entity) { plain += entity[0]; place += entity[1]; continue; }
      if (rest[0] === "\n") {
        plain = plain.trimEnd();
        flush();
        nodes.push(element("br"), "\n");
        place++;
        continue;
      }
      const found = readCode(rest) || readLink(rest) || readAddress(rest, before) || readEmphasis(rest, before);
      if (!found) {
        // Marks of one kind stand or fall together.
        const run = /^(\*+|_+|~+|.)/s.exec(rest)[0];
        plain += run;
        place += run.length;
        continue;
      }
      if (typeof found[0] === "string") plain += found[0];
      else { flush(); nodes.push(found[0]); }
      place += found[1];
    }
    flush();
    return nodes;
  }

  return text => readBlocks(text.replaceAll("\r\n", "\n").replaceAll("\t", "    ").split("\n"));
})();
