"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const drawn = new Map(); // element -> what draws it

  // plotly.js reads some tags of HTML in labels.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);

  function draw(element, traces, layout) {
    const axis = { gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false, automargin: true };
    const themed = {
      margin: { l: 50, r: 10, t: 30, b: 45 },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
      dragmode: touch ? false : "zoom", // a finger scrolls the page
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--ink"), family: "system-ui, sans-serif", size: 12 },
      xaxis: { ...axis, ...layout.xaxis },
      yaxis: { ...axis, ...layout.yaxis },
    };
    drawn.set(element, () => draw(element, traces, layout));
    return Plotly.react(element, traces, themed, { responsive: true, displaylogo: false, displayModeBar: false });
  }

  function heatmap(element, title, rows, columns, z, scale, onCell) {
    const trace = {
      type: "heatmap", z, x: columns.map(plain), y: rows.map(plain), hoverongaps: false, ...scale,
      hovertemplate: "depth %{y}, %{x}: %{z:.1%}<extra></extra>", colorbar: { tickformat: ".0%", thickness: 12 },
    };
    const layout = {
      title: { text: title, font: { size: 13 } },
      height: Math.min(700, 150 + 16 * Math.max(6, rows.length)),
      xaxis: { type: "category" },
      yaxis: { type: "category", title: { text: "layer depth" } },
      dragmode: false,
    };
    const isNew = !drawn.has(element);
    draw(element, [trace], layout);
    if (isNew) element.on("plotly_click", (event) => onCell(...event.points[0].pointNumber));
  }

  // Mean of the values of all modules of a cell, null for a cell without any.
  function grid(values, rows, columns, rowOf, columnOf) {
    const cells = rows.map(() => columns.map(() => []));
    values.forEach((value, module) => {
      if (value !== null && columnOf[module] !== null) cells[rowOf[module]][columnOf[module]].push(value);
    });
    return cells.map((row) => row.map(mean));
  }

  function withoutKind(values, kinds, kindOf) {
    const means = kinds.map((_, kind) => mean(values.filter((value, module) => value !== null && kindOf[module] === kind)));
    return values.map((value, module) => (value === null ? null : value - means[kindOf[module]]));
  }

  function routing(article) {
    const map = data.runs[Number(article.dataset.index)].map;
    const find = (name) => article.querySelector(name);
    const [expert, step] = [find("select"), find("input")];
    const all = { zmin: 0, zmax: 1, colorscale: "Viridis" };
    const stacks = map.kinds.map((kind, index) => {
      const members = map.modules.map((_, module) => map.kind[module] === index && map.matrix[module] !== null);
      const columns = [...new Set(map.matrix.filter((_, module) => members[module]))];
      const places = new Map(columns.map((name, place) => [name, place]));
      const rows = map.depths.filter((_, depth) => map.depth.some((own, module) => members[module] && own === depth));
      return {
        kind, columns, rows,
        columnOf: map.matrix.map((name, module) => (members[module] ? places.get(name) : null)),
        rowOf: map.depth.map((depth) => rows.indexOf(map.depths[depth])),
      };
    }).filter((stack) => stack.columns.length);
    for (const stack of stacks) {
      stack.element = find(".mixtures").appendChild(document.createElement("div"));
      stack.element.className = "chart mixture";
    }

    function span(view) {
      const [first, last] = map.views[view];
      return first === last ? `step ${first}` : `steps ${first} to ${last}`;
    }

    function layer(modules) {
      if (!modules.length) return;
      const bins = map.views.map((_, view) => view).slice(map.views.length > 1 ? 1 : 0);
      const traces = map.experts.map((name, own) => ({
        name: plain(name), mode: bins.length > 1 ? "lines" : "markers",
        x: bins.map((view) => mean(map.views[view])),
        y: bins.map((view) => mean(modules.map((module) => map.shares[own][view][module]).filter((share) => share !== null))),
      }));
      const more = modules.length > 1 ? ` and ${modules.length - 1} more, their mean` : "";
      find(".layer-name").textContent = `${map.modules[modules[0]]}${more}: share of steps won`;
      draw(find(".layer"), traces, {
        height: 260, showlegend: true, xaxis: { title: { text: "step" } },
        yaxis: { range: [-0.02, 1.02], tickformat: ".0%" },
      });
    }

    function show() {
      const [own, view] = [Number(expert.value), Number(step.value)];
      const values = map.shares[own][view];
      const explained = map.explained[own][view];
      find(".span").textContent = (view === 0 ? "all steps: " : "") + span(view);
      step.setAttribute("aria-valuetext", find(".span").textContent);
      find(".explained").textContent = explained === null
        ? "All layers are alike: there is nothing to explain."
        : `The kind of projection explains ${percent(explained)} of the differences between layers.`;
      const cell = (rowOf, columnOf) => (row, column) =>
        layer([...map.modules.keys()].filter((module) => rowOf[module] === row && columnOf[module] === column));
      const name = plain(map.experts[own]);
      const rest = withoutKind(values, map.kinds, map.kind);
      const reach = Math.max(0.01, ...rest.map((value) => Math.abs(value)));
      const both = { zmin: -reach, zmax: reach, colorscale: "RdBu", reversescale: false };
      const kinds = (of) => grid(of, map.depths, map.kinds, map.depth, map.kind);
      heatmap(find(".map"), `share won by ${name}`, map.depths, map.kinds, kinds(values), all, cell(map.depth, map.kind));
      heatmap(find(".rest"), "without the mean of each kind", map.depths, map.kinds, kinds(rest), both, cell(map.depth, map.kind));
      for (const { kind, rows, columns, rowOf, columnOf, element } of stacks) {
        const z = grid(values, rows, columns, rowOf, columnOf);
        heatmap(element, `${plain(kind)}, by expert of the mixture`, rows, columns, z, all, cell(rowOf, columnOf));
      }
    }

    expert.addEventListener("change", show);
    step.addEventListener("input", show);
    show();
  }

  for (const element of document.querySelectorAll("[data-figure]")) {
    const figure = data.figures[element.dataset.figure];
    draw(element, figure.data, figure.layout);
  }
  for (const article of document.querySelectorAll("article.routing")) {
    routing(article);
    const scores = data.runs[Number(article.dataset.index)].scores;
    if (scores) draw(article.querySelector(".scores"), scores.data, scores.layout);
  }
  scheme.addEventListener("change", () => drawn.forEach((redraw) => redraw()));
})();
