// A quiz: choose, then check; the reason of the chosen answer is shown below. What is said stands in the
// page's own closed box (book/_ext/course_site/quizzes.py), which is all there is without this script.

const livelyQuiz = (quiz) => {
  quiz.classList.add("live");
  quiz.querySelectorAll("fieldset").forEach((field) => {
    const radios = [...field.querySelectorAll("input")];
    const button = Object.assign(document.createElement("button"), {
      type: "button", className: "quiz-check", textContent: "Check", disabled: true,
    });
    const said = document.createElement("div");
    said.className = "quiz-said";
    said.setAttribute("role", "status");
    field.querySelector(".quiz-choices").after(button, said);

    const chosen = () => radios.find((radio) => radio.checked);
    const check = () => {
      const why = field.querySelector(`.quiz-why[data-answer="${chosen().value}"]`);
      said.replaceChildren(...[...why.childNodes].map((node) => node.cloneNode(true)));
      said.dataset.right = why.dataset.right;
      radios.forEach((radio) => delete radio.parentElement.dataset.right);
      chosen().parentElement.dataset.right = why.dataset.right;
    };
    radios.forEach((radio) => {
      radio.checked = false;  // some browsers remember a choice and show no reason for it
      radio.addEventListener("change", () => {
        button.disabled = false;
        said.replaceChildren();
        delete said.dataset.right;
        radios.forEach((other) => delete other.parentElement.dataset.right);
      });
      radio.addEventListener("keydown", (event) => {
        if (event.key === "Enter" && chosen()) { event.preventDefault(); check(); }
      });
    });
    button.addEventListener("click", check);
  });
};
document.addEventListener("DOMContentLoaded", () => document.querySelectorAll(".quiz").forEach(livelyQuiz));
