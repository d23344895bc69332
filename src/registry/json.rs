//! JSON as Go's `encoding/json` reads it, since that is what registries, `docker` and containerd are tried with.
//!
//! Types derive `Deserialize` as usual and are read with [`from_slice`]. The difference from `serde_json`:
//!
//! - the names of fields are compared without regard to case, and of two equal ones the last counts;
//! - `null` is the same as nothing, wherever a field or an entry of a map may be missing;
//! - what is not used may be anything that is JSON; text that is no UTF-8 is repaired instead of refused.
//!
//! A document is never held as a tree: a value is a piece of the text ([`Raw`]) until its type asks for it, so that a document of nothing
//! but brackets takes no more memory than its text, and no stack at all.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::value::MapDeserializer;
use serde::de::{self, DeserializeOwned, DeserializeSeed, IgnoredAny, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, forward_to_deserialize_any};
use serde_json::Error;
use serde_json::value::RawValue;

/// Reads a document.
///
/// # Errors
/// What is wrong, and in which field; or in which line and column, if it is no JSON.
pub fn from_slice<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    let text = String::from_utf8_lossy(bytes);
    let raw: &RawValue = serde_json::from_str(&text)?;
    T::deserialize(Raw::of(raw))
}

/// Reads the document that `bytes` begin with, as Go's decoder of streams does: `docker` and token services are read by it.
///
/// # Errors
/// As [`from_slice`].
pub fn from_start<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    let text = String::from_utf8_lossy(bytes);
    let mut documents = serde_json::Deserializer::from_str(&text).into_iter::<&RawValue>();
    match documents.next() {
        Some(raw) => T::deserialize(Raw::of(raw?)),
        None => Err(de::Error::custom("it is empty")),
    }
}

/// A field that nobody depends on: of another type, it is as good as missing.
pub fn loose<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(T::deserialize(deserializer).unwrap_or_default())
}

/// A map of texts, such as annotations: entries that are no text are left out, and so is what is no map.
pub fn texts<'de, D>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error>
where
    D: Deserializer<'de>,
{
    let entries: BTreeMap<String, Loose<String>> = loose(deserializer)?;
    Ok(entries
        .into_iter()
        .filter_map(|(key, text)| Some((key, text.0.ok()?)))
        .collect())
}

/// A value that is judged by whoever uses it: what is wrong with one entry of a list spoils none of the others.
pub struct Loose<T>(pub Result<T, String>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Loose<T> {
    /// Only a value that stands for itself ([`Raw`]) is passed over as a whole when it is refused in its middle.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Loose(T::deserialize(deserializer).map_err(|error| error.to_string())))
    }
}

/// The text of one value, known to be JSON, and the field that it is the value of.
#[derive(Clone, Copy)]
struct Raw<'de> {
    text: &'de str,
    field: &'static str,
}

impl<'de> Raw<'de> {
    fn of(raw: &'de RawValue) -> Self {
        Raw {
            text: raw.get(),
            field: "",
        }
    }

    fn is_null(&self) -> bool {
        self.text == "null"
    }

    /// Lets serde_json read the value. Its errors count lines from the beginning of this text: they get the name of the field instead.
    fn read<T>(
        self,
        read: impl FnOnce(&mut serde_json::Deserializer<serde_json::de::StrRead<'de>>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        read(&mut serde_json::Deserializer::from_str(self.text)).map_err(|error| {
            let text = error.to_string();
            let place = format!(" at line {} column {}", error.line(), error.column());
            let text = text.strip_suffix(&place).unwrap_or(&text);
            match self.field {
                "" => de::Error::custom(text),
                field => de::Error::custom(format_args!("{field}: {text}")),
            }
        })
    }
}

impl<'de> Deserializer<'de> for Raw<'de> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.read(|text| text.deserialize_any(visitor))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.is_null() {
            true => visitor.visit_none(),
            false => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.read(|text| text.deserialize_seq(Elements(visitor)))
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.read(|text| text.deserialize_map(Entries(visitor)))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        names: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.read(|text| text.deserialize_map(Fields { names, visitor }))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.read(|text| text.deserialize_enum(name, variants, visitor))
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    // The text says what it is; a visitor that expects something else refuses it.
    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple tuple_struct identifier
    }
}

impl<'de> IntoDeserializer<'de, Error> for Raw<'de> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

/// Reads an object for a struct with these fields.
struct Fields<V> {
    names: &'static [&'static str],
    visitor: V,
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Fields<V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.visitor.expecting(f)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<V::Value, A::Error> {
        let mut found: Vec<Option<&'de str>> = vec![None; self.names.len()];
        while let Some(key) = map.next_key::<String>()? {
            let exact = self.names.iter().position(|name| *name == key);
            let at = exact.or_else(|| self.names.iter().position(|name| name.eq_ignore_ascii_case(&key)));
            let Some(slot) = at.and_then(|at| found.get_mut(at)) else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let text = map.next_value::<&'de RawValue>()?.get();
            if text != "null" {
                *slot = Some(text);
            }
        }
        let there = self.names.iter().zip(found).filter_map(|(name, text)| {
            let raw = Raw {
                text: text?,
                field: name,
            };
            Some((*name, raw))
        });
        self.visitor
            .visit_map(MapDeserializer::<_, Error>::new(there))
            .map_err(de::Error::custom)
    }
}

/// Reads the elements of an array.
struct Elements<V>(V);

impl<'de, V: Visitor<'de>> Visitor<'de> for Elements<V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.expecting(f)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, elements: A) -> Result<V::Value, A::Error> {
        self.0.visit_seq(Elements(elements))
    }
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Elements<A> {
    type Error = A::Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, A::Error> {
        let Some(raw) = self.0.next_element::<&'de RawValue>()? else {
            return Ok(None);
        };
        seed.deserialize(Raw::of(raw)).map(Some).map_err(de::Error::custom)
    }
}

/// Reads the entries of a map, whose keys are data and stay as they are.
struct Entries<V>(V);

impl<'de, V: Visitor<'de>> Visitor<'de> for Entries<V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.expecting(f)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<V::Value, A::Error> {
        self.0.visit_map(EntryAccess { map, value: None })
    }
}

struct EntryAccess<'de, A> {
    map: A,
    value: Option<Raw<'de>>,
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for EntryAccess<'de, A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, A::Error> {
        while let Some((key, raw)) = self.map.next_entry::<String, &'de RawValue>()? {
            let value = Raw::of(raw);
            if !value.is_null() {
                self.value = Some(value);
                return seed.deserialize(key.into_deserializer()).map(Some);
            }
        }
        Ok(None)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, A::Error> {
        let value = self
            .value
            .take()
            .ok_or_else(|| de::Error::custom("a value without its key"))?;
        seed.deserialize(value).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(rename_all = "camelCase", default)]
    struct Thing {
        media_type: String,
        size: u64,
        inner: Option<Box<Thing>>,
        list: Vec<Thing>,
        #[serde(deserialize_with = "texts")]
        annotations: BTreeMap<String, String>,
        #[serde(deserialize_with = "loose")]
        unimportant: u64,
        by_name: HashMap<String, Thing>,
    }

    fn read(text: &str) -> Thing {
        from_slice(text.as_bytes()).unwrap()
    }

    #[test]
    fn names_are_compared_without_case_and_the_last_counts() {
        for text in [
            r#"{"mediaType": "right"}"#,
            r#"{"MEDIATYPE": "right"}"#,
            r#"{"mediatype": "wrong", "mediaType": "right"}"#,
            r#"{"mediaType": "wrong", "MediaType": "right"}"#,
            r#"{"mediaType": 7, "mediaType": "right"}"#,
            r#"{"mediaType": "right", "mediaType": null, "media_type": 3, "size": null, "list": null, "inner": null}"#,
        ] {
            assert_eq!(read(text).media_type, "right", "{text}");
        }
    }

    #[test]
    fn nested_values_are_read_the_same_way() {
        let thing = read(
            r#"{"inner": {"SIZE": 1, "Size": 2, "list": [{"Size": 3}, {"x": [], "size": 4}]}, "byName":
                {"A": {"size": 5}, "a": {"SIZE": 6}, "b": null}, "annotations": {"a": null, "b": 1, "c": "text", "d": {}},
                "unimportant": "seven"}"#,
        );
        let inner = thing.inner.unwrap();
        assert_eq!((inner.size, inner.list[0].size, inner.list[1].size), (2, 3, 4));
        assert_eq!(
            (thing.by_name["A"].size, thing.by_name["a"].size, thing.by_name.len()),
            (5, 6, 2)
        );
        assert_eq!(thing.annotations, BTreeMap::from([("c".to_owned(), "text".to_owned())]));
        assert_eq!(thing.unimportant, 0);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_field() {
        let error = |text: &str| from_slice::<Thing>(text.as_bytes()).unwrap_err().to_string();
        assert_eq!(
            error(r#"{"inner": {"size": -1}}"#),
            "inner: size: invalid value: integer `-1`, expected u64"
        );
        assert!(error("[]").contains("invalid type: sequence"), "{}", error("[]"));
        assert!(
            error("{\n\"size\": 1,}").contains("line 2"),
            "{}",
            error("{\n\"size\": 1,}")
        );
        assert!(error("{} x").contains("trailing"), "{}", error("{} x"));
        assert_eq!(
            from_start::<Thing>(b"{\"size\": 4}\n<!-- served by x -->")
                .unwrap()
                .size,
            4
        );
        assert!(from_start::<Thing>(b" ").is_err());
    }

    #[test]
    fn one_entry_does_not_spoil_the_others() {
        let list: Vec<Loose<Thing>> = from_slice(br#"[{"size": 1}, {"size": [[["x"]]]}, null, {"size": 2}]"#).unwrap();
        let sizes: Vec<_> = list
            .iter()
            .map(|thing| thing.0.as_ref().ok().map(|thing| thing.size))
            .collect();
        assert_eq!(sizes, [Some(1), None, None, Some(2)]);
    }

    #[test]
    fn what_is_no_text_or_very_deep_is_passed_over() {
        assert_eq!(
            from_slice::<Thing>(b"{\"author\": \"J\xf6rg\", \"size\": 1}")
                .unwrap()
                .size,
            1
        );
        let deep = format!("{{\"x\": {}{}, \"size\": 1}}", "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(read(&deep).size, 1);
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(\\{|\\}|\\[|\\]|\"size\"|\"list\"|\"inner\"|:|,|1|null|\\PC){0,40}") {
            let _ = from_slice::<Thing>(text.as_bytes());
            let _ = from_start::<Thing>(text.as_bytes());
        }

        /// What serde_json takes means the same here.
        #[test]
        fn strict_documents_mean_the_same(size: u64, text in "\\PC{0,20}", sizes in proptest::collection::vec(any::<u64>(), 0..5)) {
            let list: Vec<_> = sizes.iter().map(|size| serde_json::json!({"size": size})).collect();
            let document = serde_json::json!({"mediaType": text, "size": size, "list": list, "annotations": {&text: &text}}).to_string();
            let strict: Thing = serde_json::from_str(&document).unwrap();
            prop_assert_eq!(read(&document), strict);
        }
    }
}
