// The live tab: camera frames out, pictures in, every picture acknowledged with its age as this page measured it.
const $ = (name) => element.querySelector(".fd-" + name);
const root = $("live"), picture = $("picture"), camera = $("camera"), chart = $("chart");
const paint = picture.getContext("2d"), about = JSON.parse(root.dataset.hello);
const MOST_IN_FLIGHT = 16;
// a thread of its own cuts frames to size and packs them: the page's thread would pack only when it has nothing to paint
const packer = new Worker(URL.createObjectURL(new Blob([`
  const canvas = new OffscreenCanvas(1, 1), ink = canvas.getContext("2d", { alpha: false, willReadFrequently: true });
  const pack = async ({ image, width, height, mirrored }) => {
    if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
    const w = image.displayWidth || image.width, h = image.displayHeight || image.height;
    const side = Math.min(w / width, h / height), cutW = width * side, cutH = height * side;
    ink.setTransform(mirrored ? -1 : 1, 0, 0, 1, mirrored ? width : 0, 0);
    ink.drawImage(image, (w - cutW) / 2, (h - cutH) / 2, cutW, cutH, 0, 0, width, height);
    image.close();
    return (await canvas.convertToBlob({ type: "image/jpeg", quality: 0.85 })).arrayBuffer();
  };
  onmessage = async ({ data }) => {
    const bytes = await pack(data).catch(() => new ArrayBuffer(0));
    postMessage({ at: data.at, bytes }, [bytes]);
  };`], { type: "text/javascript" })));
packer.onmessage = ({ data: { at, bytes } }) => {
  S.encoding = false;
  if (!S.socket || S.socket.readyState !== 1 || !S.hello || !bytes.byteLength) return;
  const id = S.next++, data = new Uint8Array(13 + bytes.byteLength), view = new DataView(data.buffer);
  view.setUint8(0, 1); view.setUint32(1, id, true); view.setFloat64(5, at + S.offset, true);
  data.set(new Uint8Array(bytes), 13);
  S.flying.set(id, performance.now());
  S.socket.send(data);
};
const S = { socket: null, hello: null, source: null, stream: null, next: 0, flying: new Map(), trips: [], offset: 0, bestTrip: 1e9, fps: about.fps,
  held: 0, shown: 0, ids: [], ages: [], points: [], errors: [], lastFrame: 0, encoding: false, recording: false, ledger: null, times: [], mirrored: false };
element.fastdiff = S;

function say(text) { const box = $("message"); box.textContent = text || ""; box.hidden = !text; if (text) { S.errors.push(text); clearTimeout(say.timer); say.timer = setTimeout(() => say(""), 6000); } }
const tell = (message) => { if (S.socket && S.socket.readyState === 1) S.socket.send(JSON.stringify(message)); };
const set = (changes, seconds) => tell({ type: "set", changes, seconds: seconds || 0 });

// as many frames on their way as the line holds between here and the server, by its quickest recent round trip
function limit() {
  const now = performance.now();
  S.trips = S.trips.filter(([at]) => now - at < 10000);
  if (!S.trips.length) return 2;
  const trip = Math.min(...S.trips.map(([, took]) => took));
  $("rtt").textContent = trip.toFixed(0) + " ms";
  return Math.min(MOST_IN_FLIGHT, Math.ceil(trip * S.fps / 1000) + 1);
}

function connect() {
  return new Promise((resolve, reject) => {
    const scheme = location.protocol === "https:" ? "wss://" : "ws://";
    const socket = S.socket = new WebSocket(scheme + location.host + "/live");
    socket.binaryType = "arraybuffer";
    socket.onmessage = (event) => {
      if (typeof event.data !== "string") return frame(event.data);
      const message = JSON.parse(event.data);
      if (message.type === "hello") { S.hello = message; S.next = 0; S.held = 0; S.flying.clear(); ready(message); ping(); resolve(); }
      if (message.type === "pong") pong(message);
      if (message.type === "ledger") report(message);
      if (message.type === "recording") { S.recording = message.on; $("rec").hidden = !message.on; $("record").textContent = message.on ? "Stop recording" : "Record"; }
      if (message.type === "error") { say(message.message); if (message.fatal) reject(new Error(message.message)); }
    };
    socket.onclose = () => { if (root.dataset.state !== "idle") say("The connection ended. Start again to go on."); stop(); reject(new Error("closed")); };
  });
}
function ping() { tell({ type: "ping", sent: performance.now() }); }
function pong(message) {
  const now = performance.now(), trip = now - message.sent;
  if (trip <= S.bestTrip) { S.bestTrip = trip; S.offset = message.now - (message.sent + now) / 2; }
  S.bestTrip += 0.05;
}

async function send(at, image) {
  if (!S.socket || S.socket.readyState !== 1 || !S.hello) return;
  const gap = at - S.lastFrame; S.lastFrame = at;
  if (gap > 5 && gap < 200) S.fps = 0.95 * S.fps + 0.05 * (1000 / gap);
  if (S.flying.size >= limit() || S.socket.bufferedAmount > 65536 || S.encoding) { S.held += 1; return; }
  S.encoding = true;
  // a frame of the camera's can change its thread; what a video or a canvas shows must be copied first
  const mine = window.VideoFrame && image instanceof VideoFrame ? image : await createImageBitmap(image).catch(() => null);
  if (!mine) { S.encoding = false; return; }
  // people expect a mirror of a camera that looks at them
  packer.postMessage({ image: mine, width: S.hello.width, height: S.hello.height, mirrored: S.mirrored, at }, [mine]);
}
async function frame(buffer) {
  const view = new DataView(buffer), kind = view.getUint8(0), id = view.getUint32(1, true);
  if (kind === 2) {
    const sent = S.flying.get(id);
    if (sent !== undefined) { S.flying.delete(id); S.trips.push([performance.now(), performance.now() - sent]); }
    return;
  }
  const captured = view.getFloat64(5, true) - S.offset;
  let image;
  try { image = await createImageBitmap(new Blob([new Uint8Array(buffer, 17)], { type: "image/jpeg" })); } catch { return; }
  if (S.ids.length && id < S.ids[S.ids.length - 1] && S.shown > 0) return;
  if (picture.width !== image.width || picture.height !== image.height) { picture.width = image.width; picture.height = image.height; }
  paint.drawImage(image, 0, 0); image.close();
  const now = performance.now(), age = now - captured;
  S.shown += 1; S.ids.push(id); S.ages.push(age); S.points.push([now, age]); S.times.push(now);
  if (S.ids.length > 4000) { S.ids.splice(0, 2000); S.ages.splice(0, 2000); S.times.splice(0, 2000); }
  const data = new DataView(new ArrayBuffer(13));
  data.setUint8(0, 2); data.setUint32(1, id, true); data.setFloat32(5, age, true); data.setUint32(9, S.held, true);
  if (S.socket && S.socket.readyState === 1) S.socket.send(data.buffer);
}

const WORDS = { uplink: "to the server", wait: "waiting", unpack: "unpacking", encode: "encoder", denoise: "denoiser", decode: "decoder", others: "other frames", rest: "rest of the model", idle: "between steps", pack: "packing", send: "sending", paint: "to the screen" };
const TINTS = ["#7cc4ff", "#5a7a9a", "#9ad0c2", "#f2b65c", "#ee7d4f", "#d95f8a", "#8a6fb0", "#b9a3d0", "#4b5568", "#6fbf73", "#5d9cec", "#a6b8d8"];
function report(message) {
  const found = S.ledger = message.ledger, put = (name, text) => { $(name).textContent = text; };
  put("shown", found.frames.shown);
  const drops = Object.entries(found.frames.dropped);
  put("dropped", drops.reduce((sum, [, count]) => sum + count, 0));
  $("dropped").title = drops.map(([cause, count]) => cause + ": " + count).join("\n") || "none";
  put("jitter", found.jitter_ms === null ? "–" : found.jitter_ms.toFixed(1) + " ms");
  put("ptp", found.prompt_to_pixel_frames === null ? "–" : found.prompt_to_pixel_frames + " frames");
  put("deadline", found.deadline ? (100 * found.deadline.rate).toFixed(1) + " % late" : "none set");
  $("deadline").title = message.rung || "";
  const total = Object.values(found.stages_ms).reduce((sum, one) => sum + one.p50, 0) || 1;
  const stages = Object.entries(found.stages_ms).filter(([, one]) => one.p50 >= 0.01 * total);
  const tint = (name) => { const made = document.createElement("i"); made.style.background = TINTS[Object.keys(WORDS).indexOf(name)]; return made; };
  $("stages").replaceChildren(...stages.map(([name, one]) => { const bar = tint(name); bar.style.width = 100 * one.p50 / total + "%"; return bar; }));
  $("legend").replaceChildren(...stages.map(([name, one]) => {
    const line = document.createElement("li"), value = document.createElement("b");
    value.textContent = one.p50.toFixed(one.p50 < 10 ? 1 : 0) + " ms"; line.append(tint(name), WORDS[name] || name, value);
    return line;
  }));
  const asked = !message.rung || message.rung === "as asked";
  $("rung").hidden = asked; put("rung", asked ? "" : message.rung);
}
function draw() {
  const now = performance.now(), pen = chart.getContext("2d"), dots = window.devicePixelRatio || 1;
  const width = Math.round(chart.clientWidth * dots), height = Math.round(chart.clientHeight * dots);
  if (chart.width !== width || chart.height !== height) { chart.width = width; chart.height = height; }
  S.points = S.points.filter(([at]) => now - at < 15000);
  S.times = S.times.filter((at) => now - at < 15000);
  pen.clearRect(0, 0, width, height);
  if (S.points.length > 1) {
    const ages = S.points.map(([, age]) => age).sort((a, b) => a - b), p95 = ages[Math.floor(0.95 * (ages.length - 1))];
    const top = Math.max(20, 1.35 * p95), style = getComputedStyle(root);
    const y = (age) => height - 4 * dots - (height - 8 * dots) * Math.min(1, age / top), x = (at) => width - (now - at) / 15000 * width;
    pen.strokeStyle = style.getPropertyValue("--border-color-primary"); pen.lineWidth = dots; pen.setLineDash([4 * dots, 4 * dots]); pen.beginPath(); pen.moveTo(0, y(p95)); pen.lineTo(width, y(p95)); pen.stroke(); pen.setLineDash([]);
    pen.strokeStyle = style.getPropertyValue("--color-accent"); pen.lineWidth = 1.5 * dots; pen.lineJoin = "round"; pen.beginPath();
    S.points.forEach(([at, age], i) => i ? pen.lineTo(x(at), y(age)) : pen.moveTo(x(at), y(age)));
    pen.stroke();
    $("p95").textContent = "p95 " + p95.toFixed(0) + " ms";
    const last = S.points.slice(-8).map(([, age]) => age).sort((a, b) => a - b);
    $("age").textContent = last[last.length >> 1].toFixed(0) + " ms";
    const recent = S.times.filter((at) => now - at < 2000).length / 2;
    $("fps").textContent = recent.toFixed(0) + " fps";
  }
}

function ready(hello) {
  root.style.setProperty("--fd-aspect", hello.width / hello.height);
  if (!$("prompt").value) $("prompt").value = hello.settings.prompt;
  for (const slider of element.querySelectorAll(".fd-slider")) {
    const name = slider.dataset.name, input = slider.querySelector("input");
    if (name in hello.settings && !slider.dataset.touched) { input.value = hello.settings[name]; label(slider); }
  }
  const adapters = $("adapters");
  for (const box of element.querySelectorAll(".fd-condition")) box.hidden = !hello.conditions.includes(box.dataset.name);
  adapters.replaceChildren(...Object.keys(hello.adapters).map((name) => {
    const one = document.createElement("label"); one.className = "fd-field fd-slider"; one.dataset.name = "lora:" + name;
    const title = document.createElement("span"); title.append("LoRA " + name + " ", document.createElement("output"));
    const input = document.createElement("input"); Object.assign(input, { type: "range", min: 0, max: 1.5, step: 0.01, value: hello.adapters[name] });
    one.append(title, input); label(one); return one;
  }));
  $("record").disabled = !hello.records || !S.socket;
  $("record").title = hello.records ? "" : "Start the server with --record FOLDER to allow recordings";
}
function label(slider) {
  const input = slider.querySelector("input"), name = slider.dataset.name;
  slider.querySelector("output").textContent = name === "seconds" ? (+input.value).toFixed(1) + " s" : (name === "steps" || name === "seed") ? input.value : (+input.value).toFixed(2);
}
// a video model blends neither prompts nor seeds, and guides with a negative prompt or not at all
const GUIDED = about.video ? "full" : "self";
for (const one of element.querySelectorAll('[data-name="seconds"], .fd-check')) one.hidden = about.video;
const fade = () => about.video ? 0 : +element.querySelector('[data-name="seconds"] input').value;
element.addEventListener("input", (event) => {
  const slider = event.target.closest(".fd-slider");
  if (slider) {
    slider.dataset.touched = "1"; label(slider);
    const name = slider.dataset.name, value = +event.target.value;
    if (name === "seconds") return;
    if (name === "control" || name === "image_prompt") { if (S.conditions.has(name)) set({ [name]: { scale: value } }); return; }
    set(name === "guidance_scale" ? { guidance: value > 1 ? GUIDED : "none", guidance_scale: value } : { [name]: value }, name === "seed" ? fade() : 0);
  }
  if (event.target === $("prompt")) { clearTimeout(S.typing); S.typing = setTimeout(() => { if ($("prompt").value.trim()) set({ prompt: $("prompt").value }, fade()); }, 250); }
});
const CONDITIONS = ["control", "image_prompt"];
S.conditions = new Set(); S.lags = [];
element.addEventListener("change", async (event) => {
  const box = event.target.closest(".fd-condition");
  if (!box || event.target.type !== "file") return;
  const file = event.target.files[0], name = box.dataset.name;
  if (!S.socket) return say("Start the camera first.");
  if (!file) { S.conditions.delete(name); return set({ [name]: null }); }
  const image = await createImageBitmap(file), side = Math.min(1, 1024 / Math.max(image.width, image.height)), made = document.createElement("canvas");
  made.width = image.width * side; made.height = image.height * side; made.getContext("2d").drawImage(image, 0, 0, made.width, made.height);
  made.toBlob(async (blob) => {
    const bytes = new Uint8Array(await blob.arrayBuffer()), data = new Uint8Array(6 + bytes.length), view = new DataView(data.buffer);
    view.setUint8(0, 3); view.setUint8(1, CONDITIONS.indexOf(name)); view.setFloat32(2, +box.querySelector("input[type=range]").value, true);
    data.set(bytes, 6); S.socket.send(data); S.conditions.add(name);
  }, "image/jpeg", 0.92);
});
$("retarget").addEventListener("change", () => set({ on_update: $("retarget").checked ? "retarget" : "finish" }));

async function go(kind) {
  say("");
  try {
    if (!window.OffscreenCanvas) throw new Error("This browser is too old for the live view; stream through Gradio instead, below.");
    if (kind === "camera") {
      if (!navigator.mediaDevices) throw new Error("Browsers give a camera only to https pages and to localhost. Start the server with --https, or open it as localhost.");
      S.stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: Math.max(512, about.width) }, height: { ideal: Math.max(512, about.height) }, frameRate: { ideal: about.fps } } });
      S.mirrored = S.stream.getVideoTracks()[0].getSettings().facingMode !== "environment";
      root.toggleAttribute("data-mirrored", S.mirrored);
      camera.srcObject = S.stream; await camera.play(); S.source = camera;
    } else { S.mirrored = false; S.source = scene(); }
    await connect();
    root.dataset.state = kind; $("stop").disabled = $("snap").disabled = false;
    const changes = { prompt: $("prompt").value || S.hello.settings.prompt };
    for (const slider of element.querySelectorAll(".fd-slider[data-touched]")) if (slider.dataset.name in S.hello.settings || slider.dataset.name.startsWith("lora:")) changes[slider.dataset.name] = +slider.querySelector("input").value;
    if (changes.guidance_scale > 1) changes.guidance = GUIDED;
    set(changes);
    S.pings = setInterval(ping, 1000); S.drawing = setInterval(draw, 100);
    kind === "camera" ? watch() : animate();
  } catch (error) { stop(); say(error.name === "NotAllowedError" ? "The camera was not allowed. Allow it in the address bar, or use the test scene." : error.message); }
}
// the camera's own time where the browser tells it, so that an age counts from the glass and not from this script
function taken(told) {
  const now = performance.now(), at = told.captureTime;
  const known = at !== undefined && at <= now && now - at < 1000;
  S.lags.push(known ? now - at : null); if (S.lags.length > 1000) S.lags.splice(0, 500);
  return known ? at : now;
}
async function watch() {
  if (!window.MediaStreamTrackProcessor) return look();
  // frames as they come from the camera; a video element shows them one refresh of the screen later
  const reader = new MediaStreamTrackProcessor({ track: S.stream.getVideoTracks()[0] }).readable.getReader();
  while (S.source === camera) {
    const { value, done } = await reader.read();
    if (done) return;
    if (S.source === camera) send(taken(value.metadata ? value.metadata() : {}), value);
    value.close(); // what has gone to the packer is not closed by this
  }
}
function look() { if (S.source === camera) camera.requestVideoFrameCallback((now, told) => { send(taken(told), camera); look(); }); }
function scene() { const made = document.createElement("canvas"); made.width = made.height = 256; return made; }
function animate() {
  const pen = S.source.getContext("2d"), source = S.source, begun = performance.now();
  const step = () => {
    if (S.source !== source) return;
    const t = (performance.now() - begun) / 1000;
    pen.fillStyle = "#2456d8"; pen.fillRect(0, 0, 256, 256); pen.fillStyle = "#d8302a";
    pen.beginPath(); pen.arc(128 + 62 * Math.sin(t * 0.9), 128 + 48 * Math.cos(t * 0.7), 58, 0, 7); pen.fill();
    send(performance.now(), source);
  };
  S.ticking = setInterval(step, 1000 / about.fps);
}
function stop() {
  root.dataset.state = "idle"; S.source = null;
  for (const name of ["stop", "snap", "record"]) $(name).disabled = true;
  for (const name of ["pings", "drawing", "ticking"]) clearInterval(S[name]);
  if (S.stream) S.stream.getTracks().forEach((track) => track.stop());
  S.stream = null; camera.srcObject = null;
  S.conditions.clear();
  const socket = S.socket; S.socket = null; S.hello = null;
  if (socket) { socket.onclose = null; socket.close(); }
}
$("start").addEventListener("click", () => go("camera"));
$("clip").addEventListener("click", () => go("scene"));
$("stop").addEventListener("click", stop);
$("record").addEventListener("click", () => tell({ type: "record", on: !S.recording }));
$("snap").addEventListener("click", () => picture.toBlob((blob) => {
  const link = document.createElement("a"); link.href = URL.createObjectURL(blob); link.download = "fastdiff-" + Date.now() + ".png"; link.click(); setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}));
if (!window.isSecureContext) $("hint").textContent = "Browsers give cameras only to https pages and to localhost. Start the server with --https; the test scene works without.";
ready(about);
stop();
