// Elements made by code. Text is only ever text: names come from files, and nothing here reads them as markup.

/** An element with properties, attributes (those with a dash, role and for) and children; strings become text. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "for") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

export const byId = (id) => document.getElementById(id);

/** Fill a select with options of [value, text]. */
export function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => element("option", { value, textContent: text })));
  if (chosen !== undefined) select.value = chosen;
}

/** Let the user save something. */
export function save(name, kind, ...parts) {
  const address = URL.createObjectURL(new Blob(parts, { type: kind }));
  const link = element("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

/** A file name made of names from files: letters, digits, dot, dash and underscore stay. */
export const fileName = (...parts) => parts.map((part) => part.replace(/[^\w.-]+/g, "_").replace(/^[._]+/, "")).filter(Boolean).join("-");

/** Rows as CSV. */
export function csv(rows) {
  const cell = (value) => {
    const text = value == null || Number.isNaN(value) ? "" : String(value);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map((row) => `${row.map(cell).join(",")}\n`).join("");
}
