// The playground's texts, and its examples.

import { teach } from "./words.js";

teach({
  play_mode: ["Mode", "模式"],
  play_complete: ["Complete", "续写"],
  play_insert: ["Insert", "插入"],
  play_edit: ["Edit", "编辑"],
  play_prompt: ["Text to go on with", "需要续写的文本"],
  play_before: ["Before the gap", "空缺之前"],
  play_after: ["After the gap", "空缺之后"],
  play_input: ["Text to edit", "需要编辑的文本"],
  play_instruction: ["Instruction", "指令"],
  play_instruction_hint: ["Fix the spelling mistakes.", "改正错别字。"],
  play_no_insert: ["{model} was not trained to fill a gap (infill_rate).", "{model} 没有学过填空（infill_rate）。"],
  play_no_edit: ["{model} does not chat, so it cannot be told to edit.", "{model} 不会对话，因此不能按指令编辑。"],
  play_run: ["Submit", "提交"],
  play_again: ["Regenerate", "重新生成"],
  play_take: ["Keep and go on", "保留并继续"],
  play_examples: ["Examples", "示例"],
  play_choose: ["Load an example…", "载入示例……"],
  play_output: ["What the model wrote", "模型写出的内容"],
  play_nothing_yet: ["What the model writes stands here, coloured by how probable each token was. Hover over a token, or reach it by arrow keys, to see what else it might have been; choose another, and the model goes on from there.", "模型写出的内容会显示在这里，颜色表示每个词元的概率。把鼠标移到词元上，或用方向键选择，就能看到其他可能；选择另一个词元，模型就从那里继续。"],
  play_colours: ["Colour by probability", "按概率着色"],
  play_facts: ["{n} tokens, {p} probable on average", "{n} 个词元，平均概率 {p}"],
  play_length: ["stopped at the length limit", "达到长度上限"],
  play_alternatives: ["What else it might have been", "其他可能的词元"],
  play_instead: ["Say {token} here, and go on", "在这里改用 {token} 并继续"],
  play_end: ["end", "结束"],
  play_other: ["anything else", "其他"],
  play_part: ["part of a character", "字符的一部分"],
  play_share: ["Copy a link", "复制链接"],
  play_share_hint: ["The link holds texts and settings, and no key.", "链接包含文本和设置，不含密钥。"],
  play_shared: ["The link is on the clipboard.", "链接已复制到剪贴板。"],
  play_correct: ["Correct it", "修正"],
  play_correct_hint: ["Write it as it should have been. With your consent it becomes an example to learn from; it stands among your chats.", "请写出正确的内容。经你同意后，它会成为学习的范例，并保存在你的对话中。"],
  play_longest: ["Longest text (tokens)", "长度上限（词元）"],
});

// name -> what it is called, the text, and where to stop; each in both languages
export const EXAMPLES = {
  qa: {
    title: ["Questions and answers", "问答"], stop: ["\n"],
    text: [
      "Q: What is the capital of France?\nA: Paris.\n\nQ: How many days has a leap year?\nA: 366.\n\nQ: Which planet is the largest?\nA:",
      "问：法国的首都是哪里？\n答：巴黎。\n\n问：闰年有多少天？\n答：366 天。\n\n问：最大的行星是哪一颗？\n答：",
    ],
  },
  classify: {
    title: ["Classify", "分类"], stop: ["\n"],
    text: [
      "Text: The room was clean and the staff were kind.\nMood: good\n\nText: We waited an hour, and the soup was cold.\nMood: bad\n\nText: I would come again at once.\nMood:",
      "文本：房间很干净，服务员很热情。\n情绪：好\n\n文本：等了一个小时，汤还是凉的。\n情绪：坏\n\n文本：我一定会再来。\n情绪：",
    ],
  },
  summary: {
    title: ["Summarise", "摘要"], stop: ["\n\n"],
    text: [
      "A sieve drops what is too fine and keeps what is coarse. Bakers use one to take lumps out of flour, and gardeners to take stones out of earth.\n\nIn one sentence:",
      "筛子漏下细的，留下粗的。面包师用它去掉面粉里的疙瘩，园丁用它去掉土里的石子。\n\n一句话概括：",
    ],
  },
  extract: {
    title: ["Extract", "信息抽取"], stop: ["\n\n"],
    text: [
      "From: Anna Berg moved to Oslo in 2019.\nName: Anna Berg\nPlace: Oslo\nYear: 2019\n\nFrom: In 2021 Li Wei opened a shop in Lyon.\nName:",
      "原文：安娜·贝格 2019 年搬到奥斯陆。\n姓名：安娜·贝格\n地点：奥斯陆\n年份：2019\n\n原文：2021 年，李伟在里昂开了一家店。\n姓名：",
    ],
  },
  code: {
    title: ["Write a function", "写一个函数"], stop: ["\n\n\n"],
    text: [
      'def add(a, b):\n    """Return the sum of a and b."""\n    return a + b\n\n\ndef mean(values):\n    """Return the mean of a list of numbers."""\n',
      'def add(a, b):\n    """返回 a 与 b 的和。"""\n    return a + b\n\n\ndef mean(values):\n    """返回一列数的平均值。"""\n',
    ],
  },
};
