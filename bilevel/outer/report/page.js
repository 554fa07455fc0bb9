"use strict";

(() => {
  const root = document.documentElement;
  const charts = [];

  const number = (value) => {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential(size >= 1e6 ? 2 : 3).replace(/\.?0+e/, "e");
    if (Number.isInteger(value)) return value.toLocaleString("en");
    return value.toLocaleString("en", { maximumSignificantDigits: 4 });
  };

  const element = (name, attributes = {}, ...children) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };

  const variable = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  // Ticks of a logarithmic axis: powers of ten; over few of them twice and five times as well.
  const decades = (low, high) => {
    const first = Math.floor(Math.log10(low));
    const last = Math.ceil(Math.log10(high));
    const step = Math.ceil((last - first) / 7);
    const factors = Math.log10(high / low) > 2.2 ? [1] : [1, 2, 5];
    const ticks = [];
    for (let power = first; power <= last; power += step) ticks.push(...factors.map((factor) => Number(`${factor}e${power}`)));
    const inside = ticks.filter((tick) => tick >= low && tick <= high);
    return inside.length > 1 ? inside : [low, high];
  };

  // ------------------------------------------------------------------ light and dark

  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

  const remembered = (theme) => {
    try {
      // From a file or in private windows there may be no store.
      if (theme === undefined) return window.localStorage.getItem("bilevel-theme") ?? "";
      window.localStorage.setItem("bilevel-theme", theme);
    } catch {
      return "";
    }
    return theme;
  };

  const setTheme = (theme) => {
    if (theme) root.dataset.theme = theme;
    else delete root.dataset.theme;
    charts.forEach((chart) => chart.draw());
  };

  const addThemes = () => {
    const button = element("button", { type: "button", id: "theme" });
    const names = { "": "as the system", light: "light", dark: "dark" };
    const show = () => {
      button.textContent = `Colours: ${names[root.dataset.theme ?? ""]}`;
    };
    button.addEventListener("click", () => {
      const order = ["", "light", "dark"];
      const next = order[(order.indexOf(root.dataset.theme ?? "") + 1) % order.length];
      remembered(next);
      setTheme(next);
      show();
    });
    show();
    document.getElementById("settings").append(button);
    system.addEventListener("change", () => charts.forEach((chart) => chart.draw()));
  };

  // ------------------------------------------------------------------ one chart

  class Chart {
    constructor(figure, spec) {
      this.figure = figure;
      this.spec = spec;
      this.logarithmic = spec.logarithmic;
      this.shown = spec.lines.map(() => true);
      this.zoom = null;
      this.position = null;
      this.build();
      this.draw();
      this.move(this.data[0].length - 1);
    }

    build() {
      const { figure, spec } = this;
      const caption = figure.querySelector("figcaption");
      this.plot = element("div", {
        class: "plot",
        role: "img",
        "aria-label": `Chart: ${figure.querySelector("h4").textContent}. What it shows is told below.`,
      });
      this.slider = element("input", { type: "range", min: "0", step: "1", "aria-label": `Position: ${spec.x}` });
      this.readout = element("output");
      this.slider.addEventListener("input", () => this.move(Number(this.slider.value)));
      this.legend = element("ul", { class: "legend", "aria-label": "Lines" });
      this.entries = spec.lines.map((line, place) => this.entry(line, place));
      this.legend.append(...this.entries.map((entry) => entry.item));
      const parts = [
        this.tools(),
        element("p", { class: "axis", "aria-hidden": "true" }, spec.y),
        this.plot,
        element("p", { class: "axis across", "aria-hidden": "true" }, spec.x),
        element("div", { class: "slide" }, this.slider, this.readout),
        this.legend,
      ];
      caption.before(...parts);
      this.data = this.joined();
      this.slider.max = String(this.data[0].length - 1);
      let width = 0;
      new ResizeObserver(() => {
        if (this.plot.clientWidth === width) return;
        width = this.plot.clientWidth;
        this.u?.setSize(this.size());
      }).observe(this.plot);
    }

    tools() {
      const button = (name, act, attributes = {}) => {
        const made = element("button", { type: "button", ...attributes }, name);
        made.addEventListener("click", () => act(made));
        return made;
      };
      const row = element(
        "div",
        { class: "tools", role: "group", "aria-label": "View" },
        button("Zoom in", () => this.scale(0.5)),
        button("Zoom out", () => this.scale(2)),
        button("Whole", () => this.range(null)),
      );
      const positive = this.spec.lines.every((line) => [...line.y, ...(line.low ?? [])].every((y) => y > 0));
      if (positive) {
        const name = "Logarithmic";
        const toggle = (made) => {
          this.logarithmic = !this.logarithmic;
          made.setAttribute("aria-pressed", String(this.logarithmic));
          this.draw();
        };
        row.append(button(name, toggle, { "aria-pressed": String(this.logarithmic) }));
      }
      return row;
    }

    entry(line, place) {
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      const stroke = document.createElementNS("http://www.w3.org/2000/svg", "line");
      svg.setAttribute("viewBox", "0 0 32 12");
      svg.setAttribute("aria-hidden", "true");
      const place4 = { x1: 0, y1: 6, x2: 32, y2: 6, "stroke-width": 3, "stroke-dasharray": line.dashes.join(" ") };
      for (const [key, value] of Object.entries(place4)) stroke.setAttribute(key, value);
      svg.append(stroke);
      const value = element("span", { class: "value" });
      const button = element(
        "button",
        { type: "button", "aria-pressed": "true" },
        svg,
        element("span", { class: "name" }, line.name),
        value,
      );
      button.addEventListener("click", () => {
        this.shown[place] = !this.shown[place];
        button.setAttribute("aria-pressed", String(this.shown[place]));
        for (const offset of [1, 2, 3]) this.u.setSeries(3 * place + offset, { show: this.shown[place] });
      });
      return { item: element("li", {}, button), stroke, value };
    }

    // The lines have points of their own; each brings its lowest and highest along.
    joined() {
      return uPlot.join(
        this.spec.lines.map((line) => [line.x, line.y, line.low ?? line.y, line.high ?? line.y]),
      );
    }

    colour(line) {
      const palette = isDark() ? this.spec.dark : this.spec.light;
      return line.slot < 0 ? variable("--muted") : palette[line.slot];
    }

    size() {
      return { width: Math.max(this.plot.clientWidth, 120), height: 260 };
    }

    series() {
      const paths = this.spec.held ? uPlot.paths.stepped({ align: -1 }) : uPlot.paths.linear();
      const hidden = { stroke: "transparent", width: 0, points: { show: false }, paths };
      return this.spec.lines.flatMap((line, place) => {
        const single = line.x.length === 1;
        const shown = { show: this.shown[place] };
        const colour = this.colour(line);
        return [
          {
            ...shown,
            label: line.name,
            stroke: colour,
            // Of lines that coincide, the one below shows at both sides of the one above.
            width: Math.max(3.2 - 0.4 * Math.max(line.slot, 0), 1.6),
            dash: line.dashes.length ? line.dashes : undefined,
            points: { show: single, size: 7, fill: colour },
            paths,
          },
          { ...shown, ...hidden },
          { ...shown, ...hidden },
        ];
      });
    }

    bands() {
      const bands = [];
      const areas = this.spec.lines.filter((line) => line.area).length;
      this.spec.lines.forEach((line, place) => {
        if (!line.low) return;
        const share = line.area ? Math.max(0.34 / areas, 0.12) : 0.18;
        const alpha = Math.round(255 * share).toString(16).padStart(2, "0");
        bands.push({ series: [3 * place + 3, 3 * place + 2], fill: `${this.colour(line)}${alpha}` });
      });
      return bands;
    }

    span(low, high) {
      if (low === null || high === null) return [1, 2];
      if (high > low) return [low, high];
      return this.spec.decades ? [low / 2, low * 2] : [low - 0.5, low + 0.5];
    }

    // Heights of what is shown, with room at both ends.
    heights(u, low, high) {
      const { mark, fromZero } = this.spec;
      if (low === null || high === null) return this.logarithmic ? [0.1, 1] : [0, 1];
      const values = mark === null ? [low, high] : [low, high, mark];
      low = Math.min(...values);
      high = Math.max(...values);
      if (this.logarithmic && low > 0) {
        const room = Math.max((high / low) ** 0.05, 1.05);
        return [low / room, high * room];
      }
      const room = 0.05 * (high - low || Math.abs(high) || 1);
      return [fromZero ? 0 : low - room, high + room];
    }

    marked(u) {
      const { mark } = this.spec;
      if (mark === null) return;
      const y = Math.round(u.valToPos(mark, "y", true));
      const { left, top, width, height } = u.bbox;
      if (y < top || y > top + height) return;
      u.ctx.save();
      u.ctx.strokeStyle = variable("--text");
      u.ctx.lineWidth = devicePixelRatio;
      u.ctx.setLineDash([devicePixelRatio, 3 * devicePixelRatio]);
      u.ctx.beginPath();
      u.ctx.moveTo(left, y);
      u.ctx.lineTo(left + width, y);
      u.ctx.stroke();
      u.ctx.restore();
    }

    draw() {
      this.u?.destroy();
      const axis = { stroke: variable("--muted"), grid: { stroke: variable("--grid"), width: 1 }, font: "12px system-ui, sans-serif" };
      axis.ticks = { ...axis.grid, size: 4 };
      const written = (u, splits) => splits.map((value) => (value === null ? "" : number(value)));
      const ticks = (log) => (log ? { splits: (u, side, low, high) => decades(low, high), filter: (u, splits) => splits } : {});
      const options = {
        ...this.size(),
        scales: {
          x: { time: false, distr: this.spec.decades ? 3 : 1, log: 10, range: (u, low, high) => this.span(low, high) },
          y: { distr: this.logarithmic ? 3 : 1, log: 10, range: (u, low, high) => this.heights(u, low, high) },
        },
        axes: [
          { ...axis, size: 30, space: 70, values: written, ...ticks(this.spec.decades) },
          { ...axis, size: 66, values: written, ...ticks(this.logarithmic) },
        ],
        series: [{}, ...this.series()],
        bands: this.bands(),
        legend: { show: false },
        cursor: { y: false, drag: { x: true, y: false, dist: 6 }, points: { size: 7 } },
        hooks: {
          setCursor: [(u) => this.hovered(u)],
          setScale: [(u, key) => this.scaled(u, key)],
          draw: [(u) => this.marked(u)],
        },
      };
      this.entries.forEach((entry, place) => {
        entry.stroke.setAttribute("stroke", this.colour(this.spec.lines[place]));
      });
      this.u = new uPlot(options, this.data, this.plot);
      if (this.zoom) this.range(this.zoom);
      if (this.position !== null) this.tell(this.position);
    }

    scaled(u, key) {
      if (key !== "x" || !this.u) return;
      const { min, max } = u.scales.x;
      const xs = this.data[0];
      const whole = min <= xs[0] && max >= xs[xs.length - 1];
      this.zoom = whole ? null : [min, max];
      this.figure.dataset.zoomed = String(!whole);
    }

    range(limits) {
      const xs = this.data[0];
      const [min, max] = limits ?? [xs[0], xs[xs.length - 1]];
      if (max > min) this.u.setScale("x", { min, max });
    }

    // About the place that the slider is at.
    scale(factor) {
      const [into, back] = this.spec.decades ? [Math.log, Math.exp] : [Number, Number];
      const xs = this.data[0];
      const [first, last] = [into(xs[0]), into(xs[xs.length - 1])];
      const { min, max } = this.u.scales.x;
      const span = Math.min((into(max) - into(min)) * factor, last - first);
      const low = Math.min(Math.max(into(xs[this.position ?? 0]) - span / 2, first), last - span);
      if (factor > 1 && span === last - first) this.range(null);
      else this.range([back(low), back(low + span)]);
    }

    hovered(u) {
      const { idx, left } = u.cursor;
      if (idx === null || idx === undefined || left < 0) return;
      this.tell(idx);
    }

    move(position) {
      this.tell(position);
      const { u } = this;
      const left = u.valToPos(this.data[0][position], "x");
      if (left >= 0 && left <= u.over.clientWidth) u.setCursor({ left, top: u.over.clientHeight / 2 }, false);
    }

    // Slider, legend and what a screen reader says, all of the same place.
    tell(position) {
      const x = this.data[0][position];
      this.position = position;
      this.slider.value = String(position);
      this.figure.dataset.position = String(position);
      const words = [];
      this.spec.lines.forEach((line, place) => {
        const value = number(line.y[nearest(line.x, x)]);
        this.entries[place].value.textContent = value;
        if (this.shown[place]) words.push(`${line.name} ${value}`);
      });
      const where = `${this.spec.x.replace(/ \(.*\)$/, "")} ${number(x)}`;
      this.readout.textContent = this.spec.x.length < 20 || where.length < 22 ? where : number(x);
      this.slider.setAttribute("aria-valuetext", `${where}: ${words.join(", ")}`);
    }
  }

  // The place in rising numbers that is nearest to one.
  const nearest = (xs, x) => {
    let low = 0;
    let high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] <= x) low = middle;
      else high = middle;
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };

  setTheme(remembered());
  addThemes();
  const data = JSON.parse(document.getElementById("data").textContent);
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    charts.push(new Chart(figure, data[figure.dataset.chart]));
  }
})();
