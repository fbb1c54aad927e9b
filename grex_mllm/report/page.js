"use strict";
// Show only the cases of one phenomenon. The choice is hidden in the page, because without this script it would do nothing.
for (const label of document.querySelectorAll("label.filter")) {
  label.hidden = false;
  const cards = label.closest("section").querySelectorAll("article.case");
  label.querySelector("select").addEventListener("change", (event) => {
    const wanted = event.target.value;
    for (const card of cards) card.hidden = wanted !== "" && !card.dataset.tags.split("|").includes(wanted);
  });
}
