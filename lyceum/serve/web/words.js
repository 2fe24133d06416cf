// Every text of the page, in both languages. `t("key", {n: 3})` is the text in the chosen one.

const WORDS = {
  // [English, Chinese]
  new_chat: ["New chat", "新对话"],
  search: ["Search chats", "搜索对话"],
  nothing_found: ["Nothing found", "没有找到"],
  no_chats: ["Your chats will be listed here.", "对话会列在这里。"],
  pinned: ["Pinned", "置顶"],
  today: ["Today", "今天"],
  yesterday: ["Yesterday", "昨天"],
  this_week: ["Last 7 days", "近 7 天"],
  earlier: ["Earlier", "更早"],
  older: ["Show older chats", "显示更早的对话"],
  untitled: ["New chat", "新对话"],
  menu: ["Chats", "对话列表"],
  options: ["Options of {title}", "“{title}”的选项"],
  rename: ["Rename", "重命名"],
  title: ["Title", "标题"],
  pin: ["Pin", "置顶"],
  unpin: ["Unpin", "取消置顶"],
  export_json: ["Export as JSON", "导出为 JSON"],
  export_markdown: ["Export as Markdown", "导出为 Markdown"],
  delete: ["Delete", "删除"],
  deleted: ["Deleted “{title}”", "已删除“{title}”"],
  undo: ["Undo", "撤销"],
  settings: ["Settings", "设置"],
  help: ["Keyboard shortcuts", "键盘快捷键"],
  close: ["Close", "关闭"],
  hello: ["What would you like to know?", "想了解什么？"],
  studied: ["It studied {what}.", "它学过：{what}。"],
  ask_placeholder: ["Ask anything", "随便问点什么"],
  ask_model: ["Message {model}", "给 {model} 发消息"],
  send: ["Send", "发送"],
  stop: ["Stop", "停止"],
  two_answers: ["Two answers", "两个回答"],
  two_hint: ["Get two answers and say which is better", "生成两个回答，由你评判哪个更好"],
  copy: ["Copy", "复制"],
  copied: ["Copied", "已复制"],
  copy_code: ["Copy code", "复制代码"],
  edit: ["Edit", "编辑"],
  edit_message: ["Edit message", "编辑消息"],
  save_ask: ["Send", "发送"],
  cancel: ["Cancel", "取消"],
  again: ["Regenerate", "重新生成"],
  continue: ["Continue", "继续"],
  correct: ["Correct this answer", "修正这个回答"],
  correction: ["The answer as it should be", "正确的回答"],
  correct_hint: ["What you write takes the answer's place, and what follows stays.", "修正后的内容会取代原回答，后面的对话保持不变。"],
  save: ["Save", "保存"],
  corrected: ["Corrected", "已修正"],
  good: ["Good answer", "回答得好"],
  bad: ["Bad answer", "回答得不好"],
  why_good: ["What was good about it? (optional)", "好在哪里？（可不填）"],
  why_bad: ["What was wrong with it? (optional)", "哪里不好？（可不填）"],
  thanks: ["Thank you. It is noted.", "谢谢，已记录。"],
  reason_wrong: ["Not correct", "不正确"],
  reason_unhelpful: ["Not helpful", "没有帮助"],
  reason_ignored: ["Did not follow my request", "没有按要求回答"],
  reason_style: ["Badly written", "表达不好"],
  reason_unsafe: ["Unsafe", "不安全"],
  reason_correct: ["Correct", "正确"],
  reason_clear: ["Clear", "清楚"],
  reason_complete: ["Complete", "完整"],
  consent: ["My judgements may train this model", "我的评价可以用来训练这个模型"],
  previous: ["Previous version", "上一个版本"],
  next: ["Next version", "下一个版本"],
  version_of: ["Version {n} of {all}", "第 {n} 个版本，共 {all} 个"],
  which: ["Which answer is better?", "哪个回答更好？"],
  left_better: ["Left", "左边"],
  right_better: ["Right", "右边"],
  tie: ["Equally good", "一样好"],
  neither: ["Both bad", "都不好"],
  answer_left: ["Answer on the left", "左边的回答"],
  answer_right: ["Answer on the right", "右边的回答"],
  judge_first: ["Choose one of the two answers first.", "请先在两个回答中选择一个。"],
  you: ["You", "你"],
  answer_done: ["The answer is complete.", "回答完毕。"],
  stopped: ["Stopped", "已停止"],
  cut: ["Cut off at the token limit", "达到长度上限，回答被截断"],
  interrupted: ["Interrupted when the server stopped", "服务器停止，回答中断"],
  failed: ["This answer failed", "这个回答失败了"],
  per_second: ["{n} tokens/s", "{n} 词元/秒"],
  tokens: ["{n} tokens", "{n} 个词元"],
  context: ["{used} of {all} tokens of context", "上下文已用 {used} / {all} 个词元"],
  dropped: ["The model no longer sees the oldest turns.", "最早的几轮对话模型已经看不到了。"],
  to_bottom: ["To the newest", "回到底部"],
  model: ["Model", "模型"],
  second_model: ["Second answer by", "第二个回答来自"],
  same_model: ["The same model", "同一个模型"],
  for_chat: ["This chat", "本对话"],
  for_page: ["This page", "本页面"],
  system: ["System prompt", "系统提示"],
  system_placeholder: ["How should the model answer?", "希望模型怎样回答？"],
  parameters: ["Parameters", "参数"],
  temperature: ["Temperature", "温度"],
  top_p: ["Top p", "Top p"],
  top_k: ["Top k", "Top k"],
  min_p: ["Min p", "Min p"],
  max_tokens: ["Longest answer", "回答长度上限"],
  repetition_penalty: ["Repetition penalty", "重复惩罚"],
  presence_penalty: ["Presence penalty", "出现惩罚"],
  frequency_penalty: ["Frequency penalty", "频率惩罚"],
  seed: ["Seed", "随机种子"],
  stop_strings: ["Stop at (one a line)", "停止词（每行一个）"],
  reset: ["Back to the defaults", "恢复默认值"],
  appearance: ["Appearance", "外观"],
  auto: ["System", "跟随系统"],
  light: ["Light", "浅色"],
  dark: ["Dark", "深色"],
  language: ["Language", "语言"],
  key_needed: ["This server needs a key", "这个服务器需要密钥"],
  key_hint: ["It stays in this tab and is forgotten when you close it.", "密钥只保存在这个标签页里，关闭后即忘记。"],
  key: ["API key", "API 密钥"],
  use_key: ["Continue", "继续"],
  offline: ["The server does not answer. Trying again…", "服务器没有响应，正在重试……"],
  try_again: ["Try again", "重试"],
  short_new: ["New chat", "新对话"],
  short_search: ["Search chats", "搜索对话"],
  short_sidebar: ["Show or hide chats", "显示或隐藏对话列表"],
  short_stop: ["Stop the answer, close what is open", "停止回答，关闭弹出的内容"],
  short_send: ["Send", "发送"],
  short_line: ["New line", "换行"],
  short_edit: ["Edit your last message (in an empty field)", "编辑上一条消息（输入框为空时）"],
  short_copy: ["Copy the last answer", "复制最后一个回答"],
  short_again: ["Regenerate the last answer", "重新生成最后一个回答"],
  short_settings: ["Settings", "设置"],
  short_help: ["These shortcuts", "查看快捷键"],
};

export const LANGUAGES = { en: "English", zh: "中文" };

let at = 0;

/** Choose a language: "en" or "zh". */
export function speak(language) {
  at = language === "zh" ? 1 : 0;
  document.documentElement.lang = at ? "zh-Hans" : "en";
}

/** The language that was chosen. */
export function language() {
  return at ? "zh" : "en";
}

/** A text; `{name}` in it is replaced by what is given under that name. */
export function t(key, given = {}) {
  return WORDS[key][at].replace(/\{(\w+)\}/g, (_, name) => String(given[name]));
}

/** A number as people of the language write it. */
export function number(value, digits = 0) {
  return value.toLocaleString(at ? "zh-CN" : "en-US", { maximumFractionDigits: digits });
}
