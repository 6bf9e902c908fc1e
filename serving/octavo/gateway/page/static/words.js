// Every word of the page, in both languages, and the numbers beside them.
const WORDS = {
  en: {
    skip: "Skip to the message field",
    docs: "API",
    settings: "Settings",
    theme: "Switch between light and dark",
    other: "中文",
    otherLabel: "切换到中文",
    welcome: "What shall we talk about?",
    lead: "The model runs on this server. What you write goes there and nowhere else.",
    samples: ["Hello, who are you?", "List 3 countries and their capitals.", "浙江的省会在哪里?"],
    conversation: "Conversation",
    message: "Message",
    placeholder: "Write a message",
    send: "Send",
    stop: "Stop",
    clear: "New conversation",
    hint: "Enter sends, Shift+Enter starts a line, Esc stops",
    you: "You",
    assistant: "Octavo",
    key: "API key",
    keyNote: "This server asks for a key. It stays in this tab.",
    system: "System message",
    temperature: "Temperature",
    topP: "Top p",
    topK: "Top k",
    maxTokens: "Max tokens",
    seed: "Seed",
    seedNote: "The same seed and the same messages give the same answer.",
    settingsNote: "A field left empty is the model's own choice.",
    reset: "Clear these fields",
    copy: "Copy",
    copied: "Copied",
    states: { ready: "Ready", loading: "Starting", draining: "Draining", down: "Not available", unreachable: "Out of reach", unknown: "…" },
    stages: { start: "", configuration: "reading the configuration", weights: "loading weights", cache: "setting up the cache", warmup: "warming up", download: "fetching the model" },
    loading: "The server is starting",
    draining: "The server finishes what it has and takes nothing new",
    down: "The model cannot be reached yet",
    unreachable: "The server does not answer; trying again",
    needKey: "Enter the API key in the settings.",
    badField: "Check the marked field in the settings.",
    finished: "The answer is complete.",
    stopped: "stopped",
    cut: "cut at the limit of tokens",
    broken: "The connection was lost.",
    tokens: (count) => `${count} ${count === 1 ? "token" : "tokens"}`,
    speed: (value) => `${value} tok/s`,
    ttft: (value) => `first after ${value}`,
  },
  zh: {
    skip: "跳到输入框",
    docs: "接口文档",
    settings: "设置",
    theme: "切换浅色与深色",
    other: "English",
    otherLabel: "Switch to English",
    welcome: "今天想聊点什么？",
    lead: "模型就运行在这台服务器上，输入的内容不会发送到别处。",
    samples: ["你好，你是谁？", "浙江的省会在哪里?", "List 3 countries and their capitals."],
    conversation: "对话",
    message: "消息",
    placeholder: "输入消息",
    send: "发送",
    stop: "停止",
    clear: "新对话",
    hint: "Enter 发送，Shift+Enter 换行，Esc 停止",
    you: "你",
    assistant: "Octavo",
    key: "API 密钥",
    keyNote: "此服务器需要密钥。密钥只保存在当前标签页。",
    system: "系统提示词",
    temperature: "温度",
    topP: "Top p",
    topK: "Top k",
    maxTokens: "最大生成长度",
    seed: "随机种子",
    seedNote: "种子和消息都相同时，回答也相同。",
    settingsNote: "留空的参数使用模型自带的默认值。",
    reset: "清空设置",
    copy: "复制",
    copied: "已复制",
    states: { ready: "就绪", loading: "启动中", draining: "排空中", down: "不可用", unreachable: "无法连接", unknown: "…" },
    stages: { start: "", configuration: "读取配置", weights: "加载权重", cache: "分配缓存", warmup: "预热", download: "下载模型" },
    loading: "服务器正在启动",
    draining: "服务器正在处理剩余请求，不再接收新请求",
    down: "暂时无法连接到模型",
    unreachable: "服务器没有响应，正在重试",
    needKey: "请在设置中填写 API 密钥。",
    badField: "请检查设置中标出的参数。",
    finished: "回答完毕。",
    stopped: "已停止",
    cut: "达到长度上限",
    broken: "连接中断。",
    tokens: (count) => `${count} 个 token`,
    speed: (value) => `${value} token/s`,
    ttft: (value) => `首 token ${value}`,
  },
};

export function currentLanguage() {
  return document.documentElement.lang.startsWith("zh") ? "zh" : "en";
}

export function words() {
  return WORDS[currentLanguage()];
}

export function setLanguage(language) {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
}

// Puts the words of the current language into every element that names one.
export function translate(root) {
  const now = words();
  for (const element of root.querySelectorAll("[data-text]")) element.textContent = now[element.dataset.text];
  for (const element of root.querySelectorAll("[data-label]")) element.setAttribute("aria-label", now[element.dataset.label]);
  for (const element of root.querySelectorAll("[data-placeholder]")) element.placeholder = now[element.dataset.placeholder];
}

export function duration(milliseconds) {
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
}
