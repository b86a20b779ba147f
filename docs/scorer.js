// Sphinx's scores, and more for a page whose title holds the words as they were asked for.
var Scorer = {
  score: (result) => {
    const asked = (new URLSearchParams(window.location.search).get("q") || "").trim().toLowerCase();
    const [, title, , , score] = result;
    return asked && title.toLowerCase().includes(asked) ? score + 20 : score;
  },
  objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
