// What the moving figures share: to be mounted in place of their still image, controls that a keyboard
// reaches, SVG in pixels of the page, and numbers that are read out. Classic scripts without imports, so
// that a page opened from a folder moves too.

const moving = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  let count = 0;

  const fill = (node, attributes, children) => {
    for (const [key, value] of Object.entries(attributes ?? {})) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined && value !== false)
        node.setAttribute(key, value === true ? "" : value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return node;
  };
  const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) =>
    fill(document.createElementNS(SVG, tag), attributes, children);

  /** The data of a figure, which the page holds as JSON. */
  const data = (name) => JSON.parse(document.getElementById(`moving-${name}`)?.textContent ?? "null");

  /** Where a value lies between the ends of an axis, in pixels. */
  const linear = ([a, b], [from, to]) => (value) => from + ((value - a) / (b - a)) * (to - from);

  /** A slider over whole numbers; `say` puts a number into words for the label and for screen readers. */
  const slider = ({ label, min, max, step = 1, value, say = String, change }) => {
    const id = `moving-control-${(count += 1)}`;
    const shown = el("output", { for: id });
    const input = el("input", { type: "range", id, min, max, step, value });
    const show = () => {
      shown.textContent = say(Number(input.value));
      input.setAttribute("aria-valuetext", shown.textContent);
      const filled = (input.value - input.min) / (input.max - input.min || 1);
      input.style.setProperty("--filled", `${100 * filled}%`);
    };
    input.addEventListener("input", () => {
      change(Number(input.value));
      show();
    });
    show();
    const set = (now, limit = input.max) => {
      input.max = limit;
      input.value = now;
      show();
    };
    return { node: el("div", { class: "mv-slider" }, el("label", { for: id }, label), shown, input), set };
  };

  /** Buttons of which one is chosen: radio buttons, so arrow keys move among them. */
  const choice = ({ label, options, value, change }) => {
    const name = `moving-choice-${(count += 1)}`;
    const inputs = new Map();
    const parts = options.map(([key, text]) => {
      const input = el("input", {
        type: "radio", name, value: key, checked: key === value, onchange: () => change(key),
      });
      inputs.set(key, input);
      return el("label", {}, input, el("span", {}, text));
    });
    const node = el("fieldset", { class: "mv-choice" }, el("legend", {}, label), el("div", {}, parts));
    const allow = (keys) =>
      inputs.forEach((input, key) => { input.disabled = !keys.includes(key); });
    return { node, allow, set: (key) => { inputs.get(key).checked = true; } };
  };

  const button = (text, press) => el("button", { type: "button", class: "mv-button", onclick: press }, text);

  /** A number with what it means below; `set` writes a new one. */
  const tile = (label) => {
    const value = el("dd", {});
    return { node: el("div", {}, el("dt", {}, label), value), set: (text) => { value.textContent = text; } };
  };

  /** One sentence on what is seen, read out shortly after the reader has stopped moving. */
  const report = () => {
    const node = el("p", { class: "mv-report", "aria-live": "polite" });
    let waiting = 0;
    const say = (text) => {
      clearTimeout(waiting);
      waiting = setTimeout(() => { node.textContent = text; }, node.textContent ? 250 : 0);
    };
    return { node, say };
  };

  /** A drawing that is made anew for every width, so that its text keeps its size. */
  const drawing = (label, paint) => {
    const node = el("div", { class: "mv-drawing" });
    let width = 0;
    const again = () => {
      if (!width) return;
      const { height, content } = paint(width);
      const box = { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label() };
      node.replaceChildren(svg("svg", box, content));
    };
    new ResizeObserver(([entry]) => {
      const now = Math.floor(entry.contentRect.width);
      if (now !== width) { width = now; again(); }
    }).observe(node);
    return { node, again };
  };

  const text = (x, y, content, attributes) => svg("text", { x, y, ...attributes }, content);
  const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
  const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)}%`;
  const minus = (number) => String(number).replace("-", "−");

  /** Build a figure wherever the page asks for it; where that fails, the still image stays. */
  const figure = (name, build) => {
    for (const place of document.querySelectorAll(`[data-figure="${name}"]`)) {
      const body = el("div", { class: "mv-body" }, build(data(name)));
      const title = place.querySelector("figcaption strong");
      title.id ||= `moving-title-${(count += 1)}`;
      fill(place, { role: "group", "aria-labelledby": title.id }, []);
      place.querySelectorAll(":scope > img, .mv-still").forEach((part) => part.remove());
      place.append(body);
    }
  };

  return {
    button, calm, choice, data, drawing, el, figure, linear, minus, percent, report, slider, svg, text, tile,
  };
})();
