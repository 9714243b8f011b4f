// Keys: 1 to 8 and L jump to panels, P pauses, Escape puts a hint away. Typing in a field is left alone.
(() => {
  const panels = ["condition", "spectrum", "saddle", "layers", "sharpness", "lipschitz", "training", "cost"];
  const calm = () => window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, textarea, select, [contenteditable], [role=combobox], [role=listbox]");
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.toLowerCase();
    if (key === "escape" && document.activeElement) document.activeElement.blur();
    if (key === "p") document.getElementById("pause")?.click();
    const name = key === "l" ? "log" : panels[Number(key) - 1];
    const panel = name && document.getElementById(`panel-${name}`);
    if (panel) {
      panel.focus({ preventScroll: true });
      panel.scrollIntoView({ behavior: calm() ? "auto" : "smooth", block: "start" });
    }
  });
})();
