// What people type as the value of a key: a scalar, [a, b], {name: value}, as in a recipe's YAML.
const SCALARS = { true: true, false: false, null: null, "~": null };

function scalar(text) {
  if (text in SCALARS) return SCALARS[text];
  return /^[-+]?(\d[\d_]*)?\.?\d[\d_]*(e[-+]?\d+)?$/i.test(text) || /^[-+]?\d[\d_]*\.$/.test(text) ? Number(text.replaceAll("_", "")) : text;
}

// The value of a text; an Error says what is wrong with it.
export function parsed(text) {
  let at = 0;
  const space = () => {
    while (/\s/.test(text[at] ?? "")) at += 1;
  };
  const expect = (sign) => {
    space();
    if (text[at] !== sign) throw new Error(`${JSON.stringify(sign)} is missing ${at < text.length ? `before ${JSON.stringify(text.slice(at, at + 12))}` : "at the end"}`);
    at += 1;
  };
  function quoted(sign) {
    const begin = (at += 1);
    while (at < text.length && text[at] !== sign) at += sign === '"' && text[at] === "\\" ? 2 : 1;
    const inner = text.slice(begin, at);
    expect(sign);
    return sign === '"' ? JSON.parse(`"${inner}"`) : inner;
  }
  function plain(ends) {
    const begin = at;
    while (at < text.length && !ends.includes(text[at])) at += 1;
    return text.slice(begin, at).trim();
  }
  function many(end, one) {
    at += 1;
    for (space(); text[at] !== end; space()) {
      one();
      space();
      if (text[at] !== end) expect(",");
    }
    at += 1;
  }
  function value(ends) {
    space();
    const found = [];
    if (text[at] === "[") {
      many("]", () => found.push(value(",]")));
      return found;
    }
    if (text[at] === "{") {
      many("}", () => {
        space();
        const name = text[at] === '"' || text[at] === "'" ? quoted(text[at]) : plain(":,}");
        expect(":");
        found.push([name, value(",}")]);
      });
      return Object.fromEntries(found);
    }
    if (text[at] === '"' || text[at] === "'") return quoted(text[at]);
    return scalar(plain(ends));
  }
  const found = value("");
  space();
  if (at < text.length) throw new Error(`${JSON.stringify(text.slice(at, at + 12))} is left over`);
  return found;
}
