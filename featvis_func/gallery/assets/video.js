"use strict";
// Videos play by themselves, unless the visitor's system asks for less motion; a button pauses each one and plays it.
((featvis) => {
  const { createElement } = featvis;
  const isReduced = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

  // Label the button of a video: an element with an image, a button, and the paths of the animation and the still.
  function label(video, playing) {
    const button = video.querySelector(".play");
    button.textContent = playing ? "Pause" : "Play";
    button.setAttribute("aria-label", `${playing ? "Pause" : "Play"} the video of ${video.dataset.title}`);
    video.dataset.playing = playing ? "yes" : "";
  }

  function startVideo(video) {
    label(video, !isReduced());
  }

  function toggleVideo(button) {
    const video = button.closest(".video");
    const playing = !video.dataset.playing;
    for (const source of video.querySelectorAll("source")) source.remove();
    video.querySelector("img").src = playing ? video.dataset.moving : video.dataset.still;
    label(video, playing);
  }

  // Create a video like `filter.html` does. The attributes are those of its image.
  function createVideo(title, moving, still, attributes) {
    const source = createElement("source", { media: "(prefers-reduced-motion: reduce)", srcset: still });
    const picture = createElement("picture", {}, source, createElement("img", { ...attributes, src: moving }));
    const button = createElement("button", { type: "button", class: "play" }, "Pause");
    const data = { "data-moving": moving, "data-still": still, "data-title": title };
    const video = createElement("div", { class: "video", ...data }, picture, button);
    startVideo(video);
    return video;
  }

  Object.assign(featvis, { startVideo, toggleVideo, createVideo });
})(window.featvis);
