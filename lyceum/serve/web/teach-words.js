// Texts of live teaching on the chat page, in both languages.

import { teach } from "./words.js";

teach({
  teach: ["Teach", "边听边教"],
  teach_hint: ["Press keys while it talks: what it says next is chosen by what you liked", "在它说话时按键，它接下来的话会照你喜欢的来选"],
  teach_keys: ["Teach while it talks", "边听边教"],
  teach_good: ["Good", "好"],
  teach_bad: ["Bad", "不好"],
  teach_undo: ["Take the last key back", "撤回上一次按键"],
  teach_idle: ["Ask something. While it talks, press for what you like and what you do not.", "先提问。它说话时，喜欢就按“好”，不喜欢就按“不好”。"],
  teach_watching: ["It listens: press for what it is saying just now.", "它在听：请为它刚说的话按键。"],
  teach_pressed: ["{good} good, {bad} bad", "好 {good} 次，不好 {bad} 次"],
  teach_lessons: ["answers learned from: {n}", "已从 {n} 个回答学习"],
  teach_trace: ["Keys on this answer: {good} good, {bad} bad", "这个回答的按键：好 {good} 次，不好 {bad} 次"],
  teach_segment: ["“{text}”: {percent}% {what}", "“{text}”：{percent}% {what}"],
  teaching: ["Teaching", "教学"],
  candidates: ["Candidates for each segment", "每一段的候选数"],
  pace: ["Tokens shown a second", "每秒显示的词元"],
  taught_nothing: ["Nothing was taught yet.", "还没有教过什么。"],
  taught_so_far: ["{model}: {presses} keys, answers: {answers}", "{model}：按键 {presses} 次，回答 {answers} 个"],
  forget: ["Forget", "忘掉"],
  forget_sure: ["Forget what you taught {model}?", "要忘掉教给 {model} 的一切吗？"],
  forget_means: ["All your keys on its answers are deleted, and it answers as it did before.", "你在它的回答上的所有按键都会被删除，它会像以前一样回答。"],
  forgotten: ["Forgotten.", "已忘掉。"],
});
