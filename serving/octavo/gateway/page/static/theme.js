// Before the first paint: the theme and the language that were chosen here earlier. Everything else waits for page.js.
(() => {
  const root = document.documentElement;
  let theme = null;
  let language = null;
  try {
    theme = localStorage.getItem("octavo.theme");
    language = localStorage.getItem("octavo.language");
  } catch {
    // storage is shut off: the system's theme and language are taken
  }
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  if (language !== "en" && language !== "zh") language = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
  root.lang = language === "zh" ? "zh-CN" : "en";
})();
