// Draws the tagged pixel-art portraits that the miniature model is trained on.
//
//   npm install            (development only: Node 20 or newer)
//   node generate.mjs pretraining FOLDER [COUNT]   12,000 portraits with captions
//   node generate.mjs held-out FILE                200 captions with their attributes
//   node generate.mjs held-out-pictures FOLDER     portraits for the first 16 of them
//   node generate.mjs zoe FOLDER                   the twelve pictures of the demonstration
//
// Portraits are a pure function of (purpose, number). Designs: @dicebear/pixel-art, CC0 1.0.
// What a portrait may look like is in palette.json, which the judge reads as well.

import fs from 'node:fs';
import path from 'node:path';
import { createAvatar } from '@dicebear/core';
import * as style from '@dicebear/pixel-art';
import { Resvg } from '@resvg/resvg-js';

const here = import.meta.dirname;
const palette = JSON.parse(fs.readFileSync(path.join(here, 'palette.json'), 'utf8'));

/** Numbers in [0, 1) from a text (FNV-1a into mulberry32). */
function stream(text) {
  let state = 0x811c9dc5;
  for (const c of text) state = Math.imul(state ^ c.charCodeAt(0), 0x01000193);
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

const pick = (random, values) => values[Math.floor(random() * values.length)];
const key = (random, table) => pick(random, Object.keys(table));

function shuffled(random, values) {
  const out = [...values];
  for (let i = out.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [out[i], out[j]] = [out[j], out[i]];
  }
  return out;
}

/** Attributes of one portrait; null where it has no such thing. */
function attributes(random) {
  const length = pick(random, ['short', 'long']);
  const chance = (p, value) => (random() < p ? value() : null);
  return {
    background: key(random, palette.background),
    hair: key(random, palette.hair),
    length,
    skin: key(random, palette.skin),
    shirt: key(random, palette.shirt),
    hat: chance(0.3, () => key(random, palette.hat)),
    glasses: chance(0.3, () => pick(random, ['glasses', 'sunglasses'])),
    beard: length === 'short' && random() < 0.2,
    earrings: random() < 0.15,
    mood: pick(random, ['smile', 'sad']),
  };
}

/** The danbooru way: a list of tags. */
function tags(a) {
  return [
    'portrait', `${a.hair} hair`, `${a.length} hair`, `${a.skin} skin`, `${a.shirt} shirt`, a.mood,
    ...(a.hat ? [`${a.hat} hat`] : []),
    ...(a.glasses ? [a.glasses] : []),
    ...(a.beard ? ['beard'] : []),
    ...(a.earrings ? ['earrings'] : []),
    `${a.background} background`,
  ];
}

/** A 128x128 PNG: every cell of the design's 16x16 grid becomes 8x8 pixels. */
function draw(random, a, fixed = {}) {
  const shapes = palette.shapes;
  const options = {
    backgroundColor: [palette.background[a.background]],
    hair: [pick(random, shapes[`${a.length} hair`])],
    hairColor: [palette.hair[a.hair]],
    skinColor: [palette.skin[a.skin]],
    clothing: [pick(random, shapes.shirt)],
    clothingColor: [palette.shirt[a.shirt]],
    hat: [pick(random, shapes.hat)],
    hatColor: [palette.hat[a.hat] ?? '000000'],
    hatProbability: a.hat ? 100 : 0,
    glasses: [pick(random, shapes[a.glasses ?? 'glasses'])],
    glassesColor: [palette.glasses],
    glassesProbability: a.glasses ? 100 : 0,
    beard: [pick(random, shapes.beard)],
    beardProbability: a.beard ? 100 : 0,
    accessories: [pick(random, shapes.earrings)],
    accessoriesColor: [palette.earrings],
    accessoriesProbability: a.earrings ? 100 : 0,
    eyes: [pick(random, shapes.eyes)],
    eyesColor: [pick(random, palette.eyes)],
    mouth: [pick(random, shapes[a.mood])],
    mouthColor: [palette.mouth],
    ...fixed,
  };
  const svg = createAvatar(style, { seed: '', ...options }).toString();
  return new Resvg(svg, { fitTo: { mode: 'width', value: 128 } }).render().asPng();
}

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
const heldOut = () => Array.from({ length: 200 }, (_, i) => attributes(stream(`held-out ${i}`)));

function pretraining(folder, count) {
  fs.mkdirSync(folder, { recursive: true });
  const reserved = heldOut();
  let written = 0;
  for (let number = 0; written < count; number++) {
    const random = stream(`pretraining ${number}`);
    const a = attributes(random);
    if (reserved.some((r) => same(r, a))) continue;
    const name = path.join(folder, String(written).padStart(5, '0'));
    fs.writeFileSync(`${name}.png`, draw(random, a));
    fs.writeFileSync(`${name}.txt`, shuffled(random, tags(a)).join(', '));
    written++;
  }
}

/** Zoe: hair buns, blue hair and a purple striped shirt, none of which pretraining has. */
function zoe(folder) {
  fs.mkdirSync(folder, { recursive: true });
  for (let i = 0; i < 12; i++) {
    const random = stream(`zoe ${i}`);
    const a = {
      ...attributes(random),
      background: Object.keys(palette.background)[i % 8],
      hair: 'blue', length: 'long', skin: 'light', shirt: 'purple', hat: null,
      glasses: i % 4 === 3 ? 'glasses' : null, beard: false, earrings: i % 3 === 1,
    };
    const { hair, colour, shirt, shirtColour } = palette.zoe;
    const png = draw(random, a, {
      hair: [hair], hairColor: [colour], clothing: [shirt], clothingColor: [shirtColour],
    });
    const described = tags(a).filter((t) => !palette.zoe.tags.includes(t));
    const name = path.join(folder, `zoe_${String(i + 1).padStart(2, '0')}`);
    fs.writeFileSync(`${name}.png`, png);
    fs.writeFileSync(`${name}.txt`, ['zoe', ...described].join(', '));
  }
}

const [, , what, target, count] = process.argv;
if (what === 'pretraining' && target) {
  pretraining(target, Number(count ?? 12000));
} else if (what === 'held-out' && target) {
  const rows = heldOut().map((a, i) => ({
    prompt: shuffled(stream(`held-out order ${i}`), tags(a)).join(', '), ...a,
  }));
  fs.writeFileSync(target, `[\n${rows.map((r) => JSON.stringify(r)).join(',\n')}\n]\n`);
} else if (what === 'held-out-pictures' && target) {
  fs.mkdirSync(target, { recursive: true });
  heldOut().slice(0, 16).forEach((a, i) => {
    const name = path.join(target, `${String(i).padStart(2, '0')}.png`);
    fs.writeFileSync(name, draw(stream(`held-out picture ${i}`), a));
  });
} else if (what === 'zoe' && target) {
  zoe(target);
} else {
  console.error('usage: node generate.mjs pretraining|held-out|held-out-pictures|zoe TARGET [COUNT]');
  process.exit(2);
}
