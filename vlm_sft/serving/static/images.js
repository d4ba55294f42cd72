/** The images of the next question: chosen, dropped, pasted or from the camera. */

const list = document.getElementById("attached");
const problem = document.getElementById("problem");

/** The images, as {name, uri}: `uri` is a data URI with the bytes of the file. */
let images = [];

/** Return the images, and forget them. */
export function takeImages() {
  const taken = images;
  setImages([]);
  return taken;
}

export function numImages() {
  return images.length;
}

export function setImages(found) {
  images = found;
  list.replaceChildren(...images.map(entry));
}

/** Return an element that shows an image, or its name if the browser cannot show it. */
export function preview(image) {
  const shown = document.createElement("img");
  shown.src = image.uri;
  shown.alt = image.name;
  shown.addEventListener("error", () => {
    const name = document.createElement("div");
    name.className = "no-preview";
    name.textContent = `${image.name} (no preview)`;
    shown.replaceWith(name);
  });
  return shown;
}

export function showProblem(text) {
  problem.textContent = text;
}

function entry(image) {
  const remove = document.createElement("button");
  remove.type = "button";
  remove.textContent = "×";
  remove.setAttribute("aria-label", `Remove ${image.name}`);
  remove.addEventListener("click", () => {
    setImages(images.filter((other) => other !== image));
    document.getElementById("question").focus();
  });
  const item = document.createElement("li");
  item.append(preview(image), remove);
  return item;
}

async function addFiles(files) {
  showProblem("");
  for (const file of files) {
    if (file.type && !file.type.startsWith("image/")) {
      showProblem(`${file.name} is not an image.`);
      continue;
    }
    try {
      const uri = await readUri(file);
      setImages([...images, { name: file.name || "pasted image", uri }]);
    } catch {
      showProblem(`${file.name} cannot be read.`);
    }
  }
}

function readUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    // The server looks at the content; a type is needed for the form of the URI only.
    reader.onload = () => resolve(`data:${file.type || "image/png"};base64,${reader.result.split(",")[1] ?? ""}`);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function watchFiles() {
  const input = document.getElementById("files");
  document.getElementById("choose").addEventListener("click", () => input.click());
  input.addEventListener("change", async () => {
    await addFiles(input.files);
    input.value = ""; // so that the same file can be chosen again
    document.getElementById("question").focus();
  });
  document.addEventListener("paste", (event) => {
    if (!event.clipboardData?.files.length) return;
    event.preventDefault();
    addFiles(event.clipboardData.files);
  });
}

function watchDrops() {
  const overlay = document.getElementById("drop");
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    overlay.hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) overlay.hidden = true;
  });
  document.addEventListener("drop", (event) => {
    overlay.hidden = true;
    if (!hasFiles(event)) return;
    event.preventDefault();
    addFiles(event.dataTransfer.files);
  });
}

function watchCamera() {
  const dialog = document.getElementById("camera-dialog");
  const video = document.getElementById("video");
  document.getElementById("camera").addEventListener("click", async () => {
    showProblem("");
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      dialog.showModal();
    } catch {
      showProblem("The camera cannot be used: there is none, or this page may not use it.");
    }
  });
  document.getElementById("close-camera").addEventListener("click", () => dialog.close());
  document.getElementById("shoot").addEventListener("click", () => {
    const canvas = document.createElement("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d").drawImage(video, 0, 0);
    setImages([...images, { name: "photo", uri: canvas.toDataURL("image/jpeg", 0.92) }]);
    dialog.close();
  });
  dialog.addEventListener("close", () => {
    for (const track of video.srcObject?.getTracks() ?? []) track.stop();
    video.srcObject = null;
  });
}

watchFiles();
watchDrops();
watchCamera();
