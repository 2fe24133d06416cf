// The texts of the page that looks inside.

import { teach } from "./words.js";

teach({
  in_text: ["Text to look at", "要观察的文本"],
  in_example: ["The cat sat on the mat, and then the cat", "今天天气很好，明天天气也很"],
  in_as_chat: ["As a question in the chat format", "按对话格式作为提问"],
  in_look: ["Look inside", "查看内部"],
  in_most: ["up to {n} tokens", "最多 {n} 个词元"],
  in_none: ["No model here can be looked into.", "这里没有可以查看的模型。"],
  in_hello: ["See how a model reads: which tokens each head of attention looks at, and what every layer would say next.", "看模型怎样阅读：每个注意力头在看哪些词元，每一层会接着说什么。"],
  in_tokens: ["How probable each token was", "每个词元的概率"],
  in_tokens_hint: ["The colour is the probability that the model gave a token before it read it. Hover, or use the arrow keys.", "颜色表示模型读到词元之前给它的概率。可以悬停，或用方向键移动。"],
  in_first: ["the first token: nothing stands before it", "第一个词元：它之前没有任何内容"],
  in_was: ["{token}: {p} probable", "{token}：概率 {p}"],
  in_would: ["The model expected", "模型原本预期"],
  in_then: ["After it the model expects", "之后模型预期"],
  in_attention: ["Who looks at whom", "谁在看谁"],
  in_attention_hint: ["One square for each head, a row for each layer. Rows of a square are the tokens that look, columns those they look at. Choose a head, then a token: the tokens before it are shaded by how much it looks at each.", "每个方块是一个注意力头，每行是一层。方块的行是在看的词元，列是被看的词元。先选一个头，再选一个词元：它之前的词元按注意力的大小着色。"],
  in_head: ["Layer {layer}, head {head}", "第 {layer} 层，第 {head} 头"],
  in_map: ["Attention map of layer {layer}, head {head}", "第 {layer} 层第 {head} 头的注意力图"],
  in_looks: ["{from} looks at {to}: {p}", "{from} 看 {to}：{p}"],
  in_reader: ["Token that looks", "在看的词元"],
  in_lens: ["What each layer would say next", "每一层会接着说什么"],
  in_lens_hint: ["Each layer's state read as if it were the last. The lowest row is the embedding, the highest is what the model says. Early layers keep much that this reading does not show.", "把每一层的状态当作最后一层来解读。最下面一行是词嵌入，最上面一行是模型真正的输出。较早的层中有许多内容是这种解读看不到的。"],
  in_layer: ["Layer {n}", "第 {n} 层"],
  in_output: ["Output", "输出"],
  in_embedding: ["Embedding", "词嵌入"],
  in_cell: ["{layer}, after {token}", "{layer}，在 {token} 之后"],
});
