// The demo page in headless Chromium: ten questions, every request and every console error.
//
//   node browser.mjs URL QUESTIONS CHROMIUM SCREENSHOT
//
// Prints one JSON object {answers: [[tokens], ...], texts, outside: [addresses], errors: [messages]}.
import { readFile } from 'node:fs/promises';
import puppeteer from 'puppeteer-core';

const [url, questions, executablePath, screenshot] = process.argv.slice(2);
const asked = JSON.parse(await readFile(questions, 'utf-8'));
const flags = ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-background-networking'];
const browser = await puppeteer.launch({ executablePath, headless: true, args: flags, timeout: 120_000 });
const result = { answers: [], texts: [], outside: [], errors: [] };
try {
  const page = await browser.newPage();
  await page.setViewport({ width: 720, height: 640, deviceScaleFactor: 1 });
  page.on('request', (request) => {
    const own = request.url().startsWith(url) || /^(data|blob):/.test(request.url());
    if (!own) result.outside.push(request.url());
  });
  page.on('console', (message) => {
    if (['error', 'warn'].includes(message.type())) result.errors.push(message.text());
  });
  page.on('pageerror', (error) => result.errors.push(String(error)));
  page.on('requestfailed', (request) => result.errors.push(`${request.url()}: ${request.failure()?.errorText}`));
  page.on('response', (response) => {
    if (!response.ok()) result.errors.push(`${response.url()}: ${response.status()}`);
  });
  const ready = async () => {
    await page.waitForFunction(() => ['ready', 'failed'].includes(document.body.dataset.state), { timeout: 300_000 });
    const state = await page.evaluate(() => document.body.dataset.state);
    if (state !== 'ready') throw new Error(await page.$eval('#status', (element) => element.textContent));
  };
  await page.goto(url);
  await ready();
  for (const { image, question } of asked) {
    await page.evaluate(() => { document.body.dataset.state = 'waiting'; });
    await (await page.$('#file')).uploadFile(image);
    await ready();
    await page.$eval('#question', (element, text) => { element.value = text; }, question);
    await page.evaluate(() => { document.body.dataset.state = 'waiting'; });
    await page.click('#go');
    await ready();
    result.answers.push(JSON.parse(await page.evaluate(() => document.body.dataset.tokens)));
    result.texts.push(await page.$eval('#answer', (element) => element.textContent));
  }
  if (screenshot) await page.screenshot({ path: screenshot });
} finally {
  await browser.close();
}
console.log(JSON.stringify(result));
