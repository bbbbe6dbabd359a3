// Draws the charts in the page's own colours, again when light and dark change, and in light ones of a page's width to print.
(() => {
  "use strict";
  const root = document.documentElement;
  const PRINTED_WIDTH = 640;
  const NARROW = 480;
  const settings = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false, showTips: false };
  const charts = [...document.querySelectorAll(".chart")];
  const colour = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();

  const painted = (chart, width) => {
    const { data, layout } = JSON.parse(document.getElementById(chart.id + "-data").textContent);
    const [ink, muted, grid, panel] = ["ink", "muted", "grid", "panel"].map(colour);
    for (const trace of data) {
      const own = colour("series-" + trace.meta.series);
      trace.line = { ...trace.line, color: own };
      trace.marker = { ...trace.marker, color: own };
    }
    for (const axis of [layout.xaxis, layout.yaxis]) {
      Object.assign(axis, { gridcolor: grid, zerolinecolor: grid, linecolor: muted, tickcolor: muted, spikecolor: muted });
    }
    for (const shape of layout.shapes || []) shape.line.color = muted;
    layout.font = { color: ink, size: 13, family: getComputedStyle(document.body).fontFamily };
    layout.hoverlabel = { bgcolor: panel, bordercolor: muted, font: { color: ink }, namelength: -1 };
    if (width) Object.assign(layout, { width, height: 330, autosize: false });
    else if (chart.clientWidth < NARROW) layout.height = 330 + 20 * data.length; // a legend of one column
    chart.style.height = layout.height + "px";
    return [data, layout];
  };

  const draw = (chart, width) => {
    if (chart.clientWidth > 0) Plotly.react(chart, ...painted(chart, width), settings); // none where details are closed
  };
  const drawAll = (width) => charts.forEach((chart) => draw(chart, width));

  root.classList.add("js");
  drawAll();
  for (const details of document.querySelectorAll("details.run")) {
    details.addEventListener("toggle", () => details.querySelectorAll(".chart").forEach((chart) => draw(chart)));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll());
  matchMedia("print").addEventListener("change", (print) => drawAll(print.matches ? PRINTED_WIDTH : undefined));
  addEventListener("beforeprint", () => {
    root.dataset.theme = "light";
    drawAll(PRINTED_WIDTH);
  });
  addEventListener("afterprint", () => {
    delete root.dataset.theme;
    drawAll();
  });
})();
