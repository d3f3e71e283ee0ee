// Shows what an element's title holds at once, also where it has the focus; without this script
// the browser shows titles as ever. Texts are set as text: none of them can become markup.
const tip = document.getElementById("tip");
let shown = null;
function show(element) {
  hide();
  if (!element) return;
  if (element.title) {
    element.dataset.tip = element.title;
    element.removeAttribute("title");
  }
  tip.textContent = element.dataset.tip;
  tip.hidden = false;
  shown = element;
  element.setAttribute("aria-describedby", "tip");
  const box = element.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const below = box.bottom + 8 + own.height < innerHeight;
  tip.style.left = Math.max(8, Math.min(box.left, innerWidth - own.width - 8)) + "px";
  tip.style.top = (below ? box.bottom + 8 : Math.max(8, box.top - own.height - 8)) + "px";
}
function hide() {
  if (shown) shown.removeAttribute("aria-describedby");
  tip.hidden = true;
  shown = null;
}
const held = (event) => event.target.closest("[title],[data-tip]");
document.addEventListener("mouseover", (event) => show(held(event)));
document.addEventListener("focusin", (event) => show(held(event)));
document.addEventListener("focusout", hide);
document.addEventListener("scroll", hide, true);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hide();
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const group = step && document.activeElement.closest("[data-group]");
  if (!group) return;
  const all = [...group.querySelectorAll("[tabindex]")];
  const next = all[all.indexOf(document.activeElement) + step];
  if (next) {
    document.activeElement.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    event.preventDefault();
  }
});
