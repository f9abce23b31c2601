// Vercel's AI SDK with its OpenAI provider: by the Responses API, its default, and by chat.
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, streamText } from "ai";

const [model, prompt] = process.argv.slice(2);
const openai = createOpenAI({ baseURL: process.env.OPENAI_BASE_URL, apiKey: process.env.OPENAI_API_KEY });
const settings = { prompt, maxOutputTokens: 40, maxRetries: 0 };

const whole = await generateText({ model: openai(model), ...settings });
console.log("generateText:", whole.text, whole.finishReason, whole.usage.totalTokens);
const stream = streamText({ model: openai(model), ...settings });
let text = "";
for await (const delta of stream.textStream) text += delta;
console.log("streamText:", text, await stream.finishReason);
const chat = streamText({ model: openai.chat(model), ...settings });
let said = "";
for await (const delta of chat.textStream) said += delta;
console.log("streamText by chat:", said, await chat.finishReason);
