
const slider = document.querySelector("#step");
if (slider) {
  const sheets = [...document.querySelectorAll("figure.student")], said = document.querySelector(".slider output");
  slider.oninput = () => {
    const title = sheets[slider.value].dataset.title;
    sheets.forEach((sheet, number) => sheet.classList.toggle("off", number !== +slider.value));
    said.textContent = title;
    slider.setAttribute("aria-valuetext", title);
  };
  document.querySelector(".slider").hidden = false;
  slider.oninput();
}

const json = document.querySelector("#series");
const { series, names, size, steps } = json ? JSON.parse(json.textContent) : {};
for (const figure of document.querySelectorAll("figure.chart")) {
  const svg = figure.querySelector("svg"), cursor = figure.querySelector(".cursor");
  const said = figure.querySelector("output"), before = said.textContent, number = +figure.dataset.chart;
  const nearest = (points, step) =>
    points.reduce((best, point) => Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best);
  svg.onpointermove = event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) * size.width / box.width;
    const step = (x - size.left) / (size.width - size.left - size.right) * steps[number];
    const found = series[number].map(([run, points]) => [run, nearest(points, step)]);
    const at = size.left + found[0][1][0] / steps[number] * (size.width - size.left - size.right);
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.setAttribute("visibility", "visible");
    said.textContent = `step ${Math.round(found[0][1][0])}: ` + found.map(
      ([run, point]) => (names[run] ? `${names[run]} ` : "") + String(+point[1].toPrecision(4)).replace("-", "−")).join(", ");
  };
  svg.onpointerleave = () => {
    said.textContent = before;
    cursor.setAttribute("visibility", "hidden");
  };
}
