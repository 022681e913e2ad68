'use strict';
(() => {
  const charts = JSON.parse(document.getElementById('charts').textContent);
  const svgNames = 'http://www.w3.org/2000/svg';
  let axis = 0; // 0: steps, 1: seconds; the place in a point.

  const make = (parent, name, attributes, text) => {
    const isHtml = parent.namespaceURI !== svgNames && name !== 'svg';
    const made = isHtml ? document.createElement(name) : document.createElementNS(svgNames, name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    return parent.appendChild(made);
  };

  const number = (v) => {
    const size = Math.abs(v);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return Number(v.toPrecision(3)).toExponential().replace('e+', 'e');
    return String(Number(v.toPrecision(4)));
  };
  const across = (v) => {
    if (axis === 0) return v >= 1e4 ? number(v / 1000) + 'k' : number(v);
    if (v < 120) return number(v) + ' s';
    if (v < 7200) return number(v / 60) + ' min';
    return v < 172800 ? number(v / 3600) + ' h' : number(v / 86400) + ' d';
  };

  // About `count` round values from low to high.
  const ticks = (low, high, count, between) => {
    const raw = (high - low) / count;
    const power = Math.pow(10, Math.floor(Math.log10(raw)));
    let step = [1, 2, 5, 10].map((k) => k * power).find((k) => k >= raw);
    if (between) step = between.find((k) => k >= raw) || step;
    const found = [];
    for (let k = Math.ceil(low / step); k * step <= high + step * 1e-9; k += 1) found.push(k * step);
    return found;
  };
  // Powers of ten and their doubles and fivefolds; where a curve spans less than that, round values.
  const logTicks = (low, high) => {
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += 1) {
      for (const k of high / low > 3000 ? [1] : [1, 2, 5]) {
        const v = k * Math.pow(10, e);
        if (v >= low && v <= high) found.push(v);
      }
    }
    return found.length < 3 ? ticks(low, high, 4) : found;
  };
  // Between two ticks: whole steps; seconds, minutes, hours, days.
  const units = [
    [0, 1, 2, 3, 4, 5, 6, 7, 8].flatMap((e) => [1, 2, 5].map((k) => k * 10 ** e)),
    [1, 2, 5, 10, 20, 30].flatMap((k) => [k, k * 60]).concat([1, 2, 4, 6, 12, 24, 48, 120, 240].map((k) => k * 3600))
      .sort((a, b) => a - b),
  ];

  const draw = (view) => {
    const { chart, box, svg } = view;
    svg.replaceChildren();
    const w = svg.clientWidth;
    const h = svg.clientHeight;
    const shown = chart.curves.filter((curve, i) => !view.off[i] && curve.points.length > 0);
    if (w < 80 || shown.length === 0) {
      view.place = null;
      return;
    }
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const curve of shown) {
      for (const point of curve.points) {
        x0 = Math.min(x0, point[axis]);
        x1 = Math.max(x1, point[axis]);
        y0 = Math.min(y0, point[2]);
        y1 = Math.max(y1, point[2]);
      }
    }
    if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
    const log = view.log && y0 > 0;
    if (y0 === y1) {
      const by = Math.abs(y0) * 0.1 || 1;
      [y0, y1] = [y0 - by, y1 + by];
    } else if (log) {
      const by = Math.pow(y1 / y0, 0.04);
      [y0, y1] = [y0 / by, y1 * by];
    } else {
      const by = (y1 - y0) * 0.05;
      // A curve that stays above zero is not shown with an axis that begins below.
      [y0, y1] = [y0 >= 0 ? Math.max(0, y0 - by) : y0 - by, y1 + by];
    }
    const level = log ? Math.log : (v) => v;
    const levels = (log ? logTicks(y0, y1) : ticks(y0, y1, 4)).map((v) => [v, number(v)]);
    const left = 14 + 7 * Math.max(...levels.map(([, text]) => text.length));
    const [right, top, bottom] = [12, 8, 24];
    const x = (v) => left + ((v - x0) / (x1 - x0)) * (w - left - right);
    const y = (v) => h - bottom - ((level(v) - level(y0)) / (level(y1) - level(y0))) * (h - top - bottom);
    for (const [v, text] of levels) {
      make(svg, 'line', { class: 'grid', x1: left, x2: w - right, y1: y(v), y2: y(v) });
      make(svg, 'text', { x: left - 6, y: y(v) + 4, 'text-anchor': 'end' }, text);
    }
    let free = -Infinity;
    for (const v of ticks(x0, x1, Math.max(3, Math.floor(w / 75)), units[axis])) {
      const text = across(v);
      const half = text.length * 3.5;
      if (x(v) - half < free || x(v) + half > w) continue;
      free = x(v) + half + 8;
      make(svg, 'text', { x: x(v), y: h - 6, 'text-anchor': 'middle' }, text);
    }
    for (const step of axis === 0 ? chart.resumes : []) {
      if (step <= x0 || step >= x1) continue;
      const line = make(svg, 'line', { class: 'resume', x1: x(step), x2: x(step), y1: top, y2: h - bottom });
      make(line, 'title', {}, 'resumed after step ' + step);
    }
    chart.curves.forEach((curve, i) => {
      if (view.off[i] || curve.points.length === 0) return;
      const at = (point) => x(point[axis]).toFixed(1) + ' ' + y(point[2]).toFixed(1);
      const path = make(svg, 'path', { class: 'c' + (i % 8), d: 'M' + curve.points.map(at).join('L') });
      if (i >= 8) path.setAttribute('stroke-dasharray', i >= 16 ? '2 3' : '7 3');
      if (curve.points.length === 1) {
        make(svg, 'circle', { class: 'c' + (i % 8), cx: x(curve.points[0][axis]), cy: y(curve.points[0][2]), r: 3 });
      }
    });
    view.place = { x, y, x0, x1, left, right, top, bottom, w, h };
    point(view, null);
  };

  // Shows the values at a horizontal position of the pointer, or the last ones.
  const point = (view, at) => {
    const { chart, place, svg } = view;
    svg.querySelectorAll('.at').forEach((mark) => mark.remove());
    let wanted = Infinity;
    if (at !== null && place) {
      const share = (at - place.left) / (place.w - place.left - place.right);
      wanted = place.x0 + Math.min(1, Math.max(0, share)) * (place.x1 - place.x0);
    }
    let where = null;
    chart.curves.forEach((curve, i) => {
      const points = curve.points;
      let low = 0;
      for (let high = points.length - 1; low < high;) {
        const middle = (low + high) >> 1;
        if (points[middle][axis] < wanted) low = middle + 1; else high = middle;
      }
      if (low > 0 && wanted - points[low - 1][axis] < points[low][axis] - wanted) low -= 1;
      const found = points[low];
      view.values[i].textContent = found ? number(found[2]) : '\u2013';
      if (!found || view.off[i] || at === null || !place) return;
      const [x, y] = [place.x(found[axis]), place.y(found[2])];
      make(svg, 'circle', { class: 'c' + (i % 8) + ' at', cx: x, cy: y, r: 3.5 });
      if (where === null || Math.abs(found[axis] - wanted) < Math.abs(where[axis] - wanted)) where = found;
    });
    if (where) {
      const x = place.x(where[axis]);
      make(svg, 'line', { class: 'at', x1: x, x2: x, y1: place.top, y2: place.h - place.bottom });
    }
    const last = chart.curves.map((curve) => curve.points[curve.points.length - 1]).filter((found) => found);
    const step = where ? where[0] : Math.max(...last.map((found) => found[0]));
    view.where.textContent = 'at step ' + step;
  };

  const views = [...document.querySelectorAll('.chart')].map((box) => {
    const chart = charts[Number(box.dataset.chart)];
    const svg = make(box, 'svg', { role: 'img' });
    const legend = make(box, 'div', { class: 'legend' });
    const all = chart.curves.flatMap((curve) => curve.points.map((p) => p[2]));
    const low = all.reduce((a, b) => Math.min(a, b), Infinity);
    const high = all.reduce((a, b) => Math.max(a, b), -Infinity);
    const view = { chart, box, svg, off: chart.curves.map(() => false), values: [], log: chart.log && high > 4 * low };
    const last = chart.curves.filter((c) => c.points.length > 0)
      .map((c) => c.name + ' ' + number(c.points[c.points.length - 1][2]));
    svg.setAttribute('aria-label', chart.title + ', last values: ' + last.join(', '));
    if (low > 0 && high > 2 * low) {
      const button = make(box, 'button', { type: 'button', class: 'log', 'aria-pressed': view.log }, 'log');
      button.title = 'logarithmic vertical axis';
      button.addEventListener('click', () => {
        view.log = !view.log;
        button.setAttribute('aria-pressed', view.log);
        draw(view);
      });
    }
    chart.curves.forEach((curve, i) => {
      const button = make(legend, 'button', { type: 'button', 'aria-pressed': true });
      make(button, 'i', { class: 'c' + (i % 8) });
      button.append(curve.name + ' ');
      view.values.push(make(button, 'b'));
      button.addEventListener('click', () => {
        view.off[i] = !view.off[i];
        button.setAttribute('aria-pressed', !view.off[i]);
        draw(view);
      });
    });
    view.where = make(legend, 'span', { class: 'where' });
    svg.addEventListener('pointermove', (event) => point(view, event.clientX - svg.getBoundingClientRect().left));
    svg.addEventListener('pointerdown', (event) => point(view, event.clientX - svg.getBoundingClientRect().left));
    svg.addEventListener('pointerleave', () => point(view, null));
    draw(view);
    return view;
  });
  let width = window.innerWidth;
  window.addEventListener('resize', () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    views.forEach(draw);
  });
  const select = document.getElementById('axis');
  if (select) {
    axis = Number(select.value);
    select.addEventListener('change', () => {
      axis = Number(select.value);
      views.forEach(draw);
    });
    views.forEach(draw);
  }

  // Sample grids: each run shows its newest one up to the step of the slider.
  const runs = [...document.querySelectorAll('.grids')].map((figure) => ({
    images: [...figure.querySelectorAll('img')],
    said: figure.querySelector('output'),
  }));
  const steps = [...new Set(runs.flatMap((run) => run.images.map((image) => Number(image.dataset.step))))];
  steps.sort((a, b) => a - b);
  const at = document.getElementById('at');
  if (at && steps.length > 1) {
    const show = () => {
      const step = steps[Number(at.value)];
      at.setAttribute('aria-valuetext', 'step ' + step);
      for (const { images, said } of runs) {
        const until = images.filter((image) => Number(image.dataset.step) <= step);
        const shown = until[until.length - 1] || images[0];
        images.forEach((image) => { image.hidden = image !== shown; });
        if (shown) said.textContent = 'step ' + shown.dataset.step;
      }
    };
    at.max = steps.length - 1;
    at.value = steps.length - 1;
    at.addEventListener('input', show);
    document.getElementById('slider').hidden = false;
    let timer = null;
    const play = document.getElementById('play');
    play.addEventListener('click', () => {
      const stop = () => {
        clearInterval(timer);
        timer = null;
        play.textContent = 'Play';
      };
      if (timer !== null) {
        stop();
        return;
      }
      if (Number(at.value) === steps.length - 1) at.value = 0;
      show();
      play.textContent = 'Stop';
      timer = setInterval(() => {
        at.value = Number(at.value) + 1;
        show();
        if (Number(at.value) === steps.length - 1) stop();
      }, 400);
    });
    show();
  }

  for (const time of document.querySelectorAll('time')) {
    const when = new Date(time.dateTime);
    if (!Number.isNaN(when.getTime())) {
      time.title = time.dateTime;
      time.textContent = when.toLocaleString(undefined, { dateStyle: 'medium', timeStyle: 'short' });
    }
  }
})();
