// The API page: what /openapi.json says, as text.
document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
const make = (tag, text = "", parent = null) => { const node = document.createElement(tag); node.textContent = text; parent?.append(node); return node; };
const token = sessionStorage.getItem("token");
document.getElementById("example").textContent = [
  `curl -s -H 'Content-Type: image/jpeg' --data-binary @photo.jpg ${location.origin}/images`,
  `curl -s -H 'Content-Type: application/json' -d '{"image": "ID", "expressions": ["the two people on the left"]}' ${location.origin}/ground`,
  `curl -s -H 'Content-Type: application/json' -d '{"image": "ID", "expressions": ["the others"], "selected": {"objects": [0, 2]}}' ${location.origin}/ground`,
  `curl -s -H 'Content-Type: application/json' -d '{"image": "ID", "boxes_xyxy": [[10, 12, 40, 44]]}' ${location.origin}/describe`,
  `curl -s -H 'Content-Type: application/json' -d '{"expression": "two people on a bench", "top": 5}' ${location.origin}/search`,
].join("\n");
const answer = await fetch("/openapi.json", { headers: token ? { Authorization: `Bearer ${token}` } : {} });
const routes = document.getElementById("routes");
if (!answer.ok) make("p", "The description needs the token: enter it on the page first.", routes);
else {
  const api = await answer.json();
  for (const [path, methods] of Object.entries(api.paths)) for (const [method, route] of Object.entries(methods)) {
    const section = make("section", "", routes), title = make("h2", "", section);
    make("b", method.toUpperCase(), title); title.append(path);
    make("p", route.description ?? "", section);
    const content = route.requestBody?.content ?? {}, name = content["application/json"]?.schema?.$ref?.split("/").pop();
    const table = make("table", "", section), schema = name ? api.components.schemas[name] : { properties: {} };
    const line = (field, kind, note) => { const row = make("tr", "", table); make("td", field, row); make("td", kind, row); make("td", note, row); };
    for (const item of route.parameters ?? []) line(item.name, `${item.schema.type ?? ""}, ${item.in}`, item.required ? "required" : "");
    for (const [field, about] of Object.entries(schema.properties ?? {})) {
      const part = (about.anyOf ?? [about]).map((option) => option.$ref).find(Boolean)?.split("/").pop();
      const kind = about.type ?? (about.anyOf ?? []).map((option) => option.type ?? "object").join(" or ");
      line(field, kind, [about.description, (schema.required ?? []).includes(field) ? "required" : `default ${JSON.stringify(about.default ?? null)}`].filter(Boolean).join("; "));
      for (const [inner, told] of Object.entries(api.components.schemas[part]?.properties ?? {})) line(`${field}.${inner}`, told.type ?? "", told.description ?? "");
    }
    if (!name && Object.keys(content).length) line("the body", Object.keys(content).join(", "), "");
  }
}
