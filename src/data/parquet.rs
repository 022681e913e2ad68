//! Reading images from Parquet tables, as Hugging Face's `datasets` writes them: a column `image` (or `img`) of structs
//! {bytes, path}, of which `bytes` is a whole image file, an integer column `label`, and the names of the classes in
//! the tables' metadata. A column of plain bytes is read as well. Shards follow each other in the order of their names.
//!
//! `train-00000-of-00012.parquet` and files in a folder `train` are of the split train, and so with validation and
//! test.
//!
//! A cell can only be read behind those before it, so cells are read in their order, some hundred at a time.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use parquet::basic::{Compression, CompressionCodec, Repetition, Type};
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::column::reader::{ColumnReaderImpl, get_column_reader, get_typed_column_reader};
use parquet::data_type::{ByteArray, ByteArrayType, DataType, Int32Type, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use parquet::file::reader::{ChunkReader, Length};
use parquet::file::serialized_reader::SerializedPageReader;
use rayon::prelude::*;

use super::picture::{self, Fault};
use super::pictures::{Classes, Entry, Listing, Place};
use super::{Extent, NoLabels, thrift};
use crate::config::Background;
use crate::error::{Error, Result};

/// What a table begins and ends with.
pub const MAGIC: &[u8; 4] = b"PAR1";

/// Names of the columns of images and of labels, the best first.
const IMAGES: [&str; 4] = ["image", "img", "images", "jpg"];
const LABELS: [&str; 6] = ["label", "labels", "fine_label", "class", "cls", "target"];

/// Rows of a byte, at most: runs of equal cells take little room, but nobody stores so many equal images.
const MOST_ROWS: u64 = 64;

/// Tables whose cells are images.
#[derive(Default)]
pub struct Tables {
    tables: Vec<Table>,
    cursor: Mutex<Option<Cursor>>,
}

struct Table {
    path: PathBuf,
    /// The number of the column of images among the leaves.
    images: usize,
    /// Rows before each row group, and all rows.
    begins: Vec<usize>,
}

/// A place in a column.
struct Cursor {
    table: usize,
    /// The row that comes next, and the end of its group.
    row: usize,
    end: usize,
    column: ColumnReaderImpl<ByteArrayType>,
}

impl Tables {
    /// The file of a table.
    pub fn path(&self, table: usize) -> &Path {
        &self.tables[table].path
    }

    /// The bytes of cells, each a table and a row.
    pub fn read(&self, cells: &[(usize, usize)]) -> Vec<std::result::Result<Vec<u8>, Fault>> {
        let mut cursor = self.cursor.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let read = |&(table, row): &(usize, usize)| {
            let cell = self.cell(&mut cursor, table, row);
            if cell.is_err() {
                *cursor = None;
            }
            cell
        };
        cells.iter().map(read).collect()
    }

    fn cell(&self, cursor: &mut Option<Cursor>, table: usize, row: usize) -> std::result::Result<Vec<u8>, Fault> {
        let in_table = |e: String| Fault::broken(format!("its table {e}"));
        let reachable = |c: &Cursor| c.table == table && (c.row..c.end).contains(&row);
        let mut at = match cursor.take().filter(reachable) {
            Some(at) => at,
            None => {
                let Table { path, images, begins } = &self.tables[table];
                let group = begins.partition_point(|&begin| begin <= row) - 1;
                let file = File::open(path).map_err(picture::unreadable)?;
                let column = guarded(|| column(&file, &metadata(&file)?, group, *images)).map_err(in_table)?;
                Cursor { table, row: begins[group], end: begins[group + 1], column }
            }
        };
        let cell = guarded(|| {
            at.column.skip_records(row - at.row)?;
            next(&mut at.column)
        })
        .map_err(in_table)?;
        at.row = row + 1;
        *cursor = Some(at);
        cell.map(|cell| cell.data().to_vec()).ok_or_else(empty_cell)
    }
}

fn empty_cell() -> Fault {
    Fault::broken("its cell holds no bytes; an image that is only a path is not read")
}

thread_local! {
    /// True within [`guarded`].
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// True while this thread is in a library whose panics are caught and become an error, so that a hook has nothing to
/// tell of them.
pub fn panics_are_caught() -> bool {
    GUARDED.get()
}

/// Calls into the library, whose messages may have several lines, and which panics on some tables that contradict
/// themselves in ways that only its own parser sees. The error is the end of a sentence about a table.
fn guarded<T>(call: impl FnOnce() -> std::result::Result<T, ParquetError>) -> std::result::Result<T, String> {
    GUARDED.set(true);
    // Nothing that the call has changed is used after a panic.
    let called = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call));
    GUARDED.set(false);
    match called {
        Ok(read) => read.map_err(|e| {
            let e = e.to_string().replace('\n', " ");
            let unread = e.contains("feature") || e.contains("codec");
            let advice = if unread { "write it with Snappy or gzip" } else { "it is cut short or damaged" };
            format!("cannot be read ({}); {advice}", e.trim_end_matches('.'))
        }),
        Err(_) => Err("contradicts itself; it is damaged".into()),
    }
}

/// The error of a table as a whole.
fn of_table(path: &Path) -> impl Fn(String) -> Error + '_ {
    move |e| Error::file(path, format!("is a table that {e}"))
}

fn metadata(file: &File) -> std::result::Result<ParquetMetaData, ParquetError> {
    // Behind the metadata are their length and the magic number. What has no place for them the library refuses itself.
    if let Some(end) = Length::len(file).checked_sub(8) {
        let tail = file.get_bytes(end, 4)?;
        let len = u32::from_le_bytes(tail[..].try_into().expect("four bytes"));
        if let Some(start) = end.checked_sub(u64::from(len))
            && !thrift::is_sound(&file.get_bytes(start, len as usize)?)
        {
            return Err(ParquetError::General("its metadata do not hold together".into()));
        }
    }
    ParquetMetaDataReader::new().parse_and_finish(file)
}

/// The column of a row group.
fn column<T: DataType>(
    file: &File,
    metadata: &ParquetMetaData,
    group: usize,
    column: usize,
) -> std::result::Result<ColumnReaderImpl<T>, ParquetError> {
    let group = metadata.row_group(group);
    let chunk = group.column(column);
    // Read as if it was not compressed: the library would make room for whatever a page claims to unpack to.
    let packed = chunk.clone().into_builder().set_compression(Compression::UNCOMPRESSED).build()?;
    let rows = usize::try_from(group.num_rows())?;
    let pages = SerializedPageReader::new(Arc::new(Ending(file.try_clone()?)), &packed, rows, None)?;
    let pages = Pages { packed: pages, codec: chunk.compression_codec() };
    Ok(get_typed_column_reader(get_column_reader(chunk.column_descr_ptr(), Box::new(pages))))
}

/// A file at whose end reading fails. The library takes nothing for a few bytes less, and goes on for as long as a
/// damaged header claims: hours.
struct Ending(File);

/// What reads it from some byte on.
struct FromHere(BufReader<File>);

impl Length for Ending {
    fn len(&self) -> u64 {
        Length::len(&self.0)
    }
}

impl ChunkReader for Ending {
    type T = FromHere;

    fn get_read(&self, start: u64) -> std::result::Result<FromHere, ParquetError> {
        self.0.get_read(start).map(FromHere)
    }

    fn get_bytes(&self, start: u64, length: usize) -> std::result::Result<Bytes, ParquetError> {
        self.0.get_bytes(start, length)
    }
}

impl Read for FromHere {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match self.0.read(to)? {
            0 if !to.is_empty() => Err(io::ErrorKind::UnexpectedEof.into()),
            read => Ok(read),
        }
    }
}

/// The pages of a column, unpacked, of which none claims more than it has.
struct Pages {
    packed: SerializedPageReader<Ending>,
    codec: CompressionCodec,
}

impl Pages {
    /// What a page holds: `levels` bytes as they are and the rest unpacked.
    fn unpacked(&self, page: &Bytes, levels: usize) -> std::result::Result<Bytes, ParquetError> {
        // Of a page; it may hold several images.
        const LONGEST: u64 = 1 << 30;
        // Snappy makes at most 64 bytes of three.
        const MOST_OF_ONE: usize = 22;
        let too_long = || ParquetError::General("a page claims to unpack to more than it can".into());
        let (levels, packed) =
            page.split_at_checked(levels).ok_or_else(|| ParquetError::General("a page ends in its levels".into()))?;
        let mut bytes = levels.to_vec();
        match self.codec {
            CompressionCodec::UNCOMPRESSED => return Ok(page.clone()),
            // No value is there, so nothing was compressed.
            _ if packed.is_empty() => {}
            CompressionCodec::SNAPPY => {
                let damaged = |e: snap::Error| ParquetError::General(e.to_string());
                let len = snap::raw::decompress_len(packed).map_err(damaged)?;
                if len > packed.len().saturating_mul(MOST_OF_ONE) || len as u64 > LONGEST {
                    return Err(too_long());
                }
                bytes.resize(levels.len() + len, 0);
                snap::raw::Decoder::new().decompress(packed, &mut bytes[levels.len()..]).map_err(damaged)?;
            }
            CompressionCodec::GZIP => {
                let read = flate2::read::MultiGzDecoder::new(packed).take(LONGEST + 1).read_to_end(&mut bytes)?;
                if read as u64 > LONGEST {
                    return Err(too_long());
                }
            }
            other => return Err(ParquetError::General(format!("its codec is {other}"))),
        }
        Ok(bytes.into())
    }

    fn unpack(&self, page: Page) -> std::result::Result<Page, ParquetError> {
        // Of numbers and of bytes, which have their length before them.
        const LEAST_OF_A_VALUE: u64 = 4;
        let mut page = page;
        match &mut page {
            Page::DataPage { buf, .. } => *buf = self.unpacked(buf, 0)?,
            Page::DataPageV2 { is_compressed: false, .. } => {}
            Page::DataPageV2 { buf, def_levels_byte_len, rep_levels_byte_len, is_compressed, .. } => {
                *buf = self.unpacked(buf, *def_levels_byte_len as usize + *rep_levels_byte_len as usize)?;
                *is_compressed = false;
            }
            Page::DictionaryPage { buf, num_values, .. } => {
                *buf = self.unpacked(buf, 0)?;
                // The library makes room for so many before it reads the first.
                if u64::from(*num_values) * LEAST_OF_A_VALUE > buf.len() as u64 {
                    let what = format!("a dictionary of {} bytes claims {num_values} values", buf.len());
                    return Err(ParquetError::General(what));
                }
            }
        }
        Ok(page)
    }
}

impl Iterator for Pages {
    type Item = std::result::Result<Page, ParquetError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl PageReader for Pages {
    fn get_next_page(&mut self) -> std::result::Result<Option<Page>, ParquetError> {
        self.packed.get_next_page()?.map(|page| self.unpack(page)).transpose()
    }

    fn peek_next_page(&mut self) -> std::result::Result<Option<PageMetadata>, ParquetError> {
        self.packed.peek_next_page()
    }

    fn skip_next_page(&mut self) -> std::result::Result<(), ParquetError> {
        self.packed.skip_next_page()
    }

    fn at_record_boundary(&mut self) -> std::result::Result<bool, ParquetError> {
        self.packed.at_record_boundary()
    }
}

/// The next cell of a column; `None` for an empty one.
fn next<T: DataType>(column: &mut ColumnReaderImpl<T>) -> std::result::Result<Option<T::T>, ParquetError> {
    let (mut levels, mut values) = (Vec::new(), Vec::new());
    let (records, ..) = column.read_records(1, Some(&mut levels), None, &mut values)?;
    if records != 1 {
        return Err(ParquetError::General("a column ends before its row group".into()));
    }
    Ok(values.pop())
}

/// The images of the tables at `paths`, which are in the order of their names; `source` is what they are of.
pub fn open(source: &Path, paths: Vec<PathBuf>, background: Background) -> Result<Listing> {
    let mut tables = Vec::new();
    let mut columns: Option<(String, Option<String>)> = None;
    let mut labels = Vec::new();
    let mut names = Vec::new();
    for path in paths {
        let file = File::open(&path).map_err(|e| Error::file(&path, format!("cannot be read: {e}")))?;
        let metadata = guarded(|| metadata(&file)).map_err(of_table(&path))?;
        let len = file.metadata().map_err(|e| Error::file(&path, format!("cannot be read: {e}")))?.len();
        check_places(&metadata, len).map_err(of_table(&path))?;
        let (images, label) = find(&metadata).map_err(|e| Error::file(&path, e))?;
        let name = |column: usize| metadata.file_metadata().schema_descr().column(column).path().string();
        let found = (name(images), label.map(name));
        match &columns {
            Some(first) if *first != found => {
                let shown = |(images, label): &(String, Option<String>)| {
                    format!("{images} with {}", label.as_deref().unwrap_or("no labels"))
                };
                let what = format!("holds {}, where the shards before it hold {}", shown(&found), shown(first));
                return Err(Error::file(&path, what));
            }
            Some(_) => {}
            None => {
                names = label.map_or(Vec::new(), |label| class_names(&metadata, &name(label)));
                columns = Some(found);
            }
        }
        let mut begins = vec![0usize];
        for group in metadata.row_groups() {
            let rows =
                usize::try_from(group.num_rows()).ok().and_then(|rows| begins[begins.len() - 1].checked_add(rows));
            begins.push(rows.ok_or_else(|| Error::file(&path, "claims a negative number of rows; it is damaged"))?);
        }
        let rows = begins[begins.len() - 1];
        if rows as u64 > len.saturating_mul(MOST_ROWS) {
            return Err(Error::file(&path, format!("claims {rows} rows in {len} bytes; it is damaged")));
        }
        labels.push(label);
        tables.push(Table { path, images, begins });
    }
    let groups: Vec<(usize, usize)> =
        tables.iter().enumerate().flat_map(|(t, table)| (0..table.begins.len() - 1).map(move |g| (t, g))).collect();
    let read = |&(t, group): &(usize, usize)| survey(&tables[t], group, labels[t], background);
    let surveyed: Vec<_> = groups.par_iter().map(read).collect();
    let (mut entries, mut headers) = (Vec::new(), Vec::new());
    for ((t, group), surveyed) in groups.into_iter().zip(surveyed) {
        let table = &tables[t];
        let split = split(&table.path);
        for (row, (header, label)) in (table.begins[group]..).zip(surveyed?) {
            let path = table.path.join(format!("row {row}"));
            let name = match &split {
                Some(split) => Path::new(split).join(format!("{t}-{row}")),
                None => format!("{t}-{row}").into(),
            };
            let label = label.and_then(|label| u32::try_from(label).ok());
            entries.push(Entry { path, name, place: Place::Cell { table: t, row }, label });
            headers.push(header);
        }
    }
    if entries.is_empty() {
        return Err(Error::file(source, "holds no rows"));
    }
    let classes = match columns {
        Some((_, Some(_))) => Classes::Own { by: "the column of labels", names },
        _ => {
            let why = format!("has no column of labels, which is {} with whole numbers", one_of(&LABELS));
            Classes::None(NoLabels::new(source, why))
        }
    };
    let mut notes = Vec::new();
    if tables.len() > 1 {
        notes.push(format!("{} tables of {} rows together", tables.len(), entries.len()));
    }
    Ok(Listing {
        entries,
        headers,
        classes,
        tables: Tables { tables, ..Tables::default() },
        notes,
        ..Listing::default()
    })
}

/// `a, b or c`.
fn one_of(names: &[&str]) -> String {
    match names {
        [first @ .., last] if !first.is_empty() => format!("{} or {last}", first.join(", ")),
        _ => names.concat(),
    }
}

/// The split that the name of a shard, or of its folder, tells.
fn split(path: &Path) -> Option<String> {
    let stem = path.file_stem()?.to_string_lossy().into_owned();
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let parts: Vec<&str> = stem.split('-').collect();
    let own = match &parts[..] {
        [split @ .., shard, "of", shards] if digits(shard) && digits(shards) => split.join("-"),
        [split @ .., shard] if digits(shard) => split.join("-"),
        _ => stem.clone(),
    };
    let of_folder = path.parent().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    [Some(own), of_folder].into_iter().flatten().find(|name| super::pictures::role(name).is_some())
}

/// Refuses columns that lie beyond the file, which the library takes on trust.
fn check_places(metadata: &ParquetMetaData, len: u64) -> std::result::Result<(), String> {
    for column in metadata.row_groups().iter().flat_map(|group| group.columns()) {
        let begin = column.dictionary_page_offset().unwrap_or(column.data_page_offset());
        let end = begin.checked_add(column.compressed_size()).and_then(|end| u64::try_from(end).ok());
        let negative = begin < 0 || column.data_page_offset() < 0 || column.compressed_size() < 0;
        if negative || end.is_none_or(|end| end > len) {
            return Err(format!("places a column beyond its {len} bytes; it is cut short or damaged"));
        }
    }
    Ok(())
}

/// The columns of the images and of the labels, by their numbers among the leaves.
fn find(metadata: &ParquetMetaData) -> std::result::Result<(usize, Option<usize>), String> {
    let schema = metadata.file_metadata().schema_descr();
    let leaves: Vec<(String, usize)> =
        schema.columns().iter().enumerate().map(|(k, column)| (column.path().string(), k)).collect();
    let flat = |k: usize| schema.column(k).max_rep_level() == 0;
    let bytes = |k: usize| flat(k) && schema.column(k).physical_type() == Type::BYTE_ARRAY;
    let named = |name: &str| leaves.iter().find(|(leaf, _)| leaf == name).map(|(_, k)| *k);
    // A struct with bytes, by its usual names; else the only one; else a column of bytes by one of the names.
    let usual = IMAGES.iter().filter_map(|name| named(&format!("{name}.bytes"))).find(|&k| bytes(k));
    let structs: Vec<usize> =
        leaves.iter().filter(|(leaf, k)| leaf.ends_with(".bytes") && bytes(*k)).map(|(_, k)| *k).collect();
    let only = if let [one] = structs[..] { Some(one) } else { None };
    let plain = || IMAGES.iter().filter_map(|name| named(name)).find(|&k| bytes(k));
    let images = usual.or(only).or_else(plain).ok_or_else(|| {
        let columns: BTreeSet<String> = leaves.iter().take(20).map(|(leaf, _)| leaf.clone()).collect();
        let columns: Vec<String> = columns.into_iter().collect();
        let columns = if columns.is_empty() { "none".into() } else { columns.join(", ") };
        format!("holds no column of images, which is image.bytes or img.bytes; its columns are: {columns}")
    })?;
    let whole = |k: &usize| {
        flat(*k)
            && matches!(schema.column(*k).physical_type(), Type::INT32 | Type::INT64)
            && schema.column(*k).self_type().get_basic_info().repetition() != Repetition::REPEATED
    };
    Ok((images, LABELS.iter().filter_map(|name| named(name)).find(whole)))
}

/// Names of the classes of column `label`, as `datasets` writes them into the metadata: {"info": {"features": {"label":
/// {"names": [...]}}}}.
fn class_names(metadata: &ParquetMetaData, label: &str) -> Vec<String> {
    let pairs = metadata.file_metadata().key_value_metadata();
    let value =
        pairs.into_iter().flatten().find(|pair| pair.key == "huggingface").and_then(|pair| pair.value.as_deref());
    let json: Option<serde_json::Value> = value.and_then(|value| serde_json::from_str(value).ok());
    let names = json.as_ref().and_then(|json| json["info"]["features"][label]["names"].as_array());
    names.into_iter().flatten().map(|name| name.as_str().map_or(name.to_string(), String::from)).collect()
}

/// What is known of a row without decoding its image: its header, and its label.
type Row = (std::result::Result<Extent, Fault>, Option<i64>);

/// The rows of a group.
fn survey(table: &Table, group: usize, label: Option<usize>, background: Background) -> Result<Vec<Row>> {
    let rows = table.begins[group + 1] - table.begins[group];
    let unreadable = of_table(&table.path);
    let file = File::open(&table.path).map_err(|e| Error::file(&table.path, format!("cannot be read: {e}")))?;
    let metadata = guarded(|| metadata(&file)).map_err(&unreadable)?;
    let mut images = guarded(|| column::<ByteArrayType>(&file, &metadata, group, table.images)).map_err(&unreadable)?;
    // Not with room for as many as are claimed: each is read first.
    let mut found: Vec<Row> = Vec::new();
    for _ in 0..rows {
        let cell: Option<ByteArray> = guarded(|| next(&mut images)).map_err(&unreadable)?;
        let header = match cell {
            Some(cell) => picture::header_of(io::Cursor::new(cell.data()), background),
            None => Err(empty_cell()),
        };
        found.push((header, None));
    }
    let Some(label) = label else { return Ok(found) };
    let wide = metadata.file_metadata().schema_descr().column(label).physical_type() == Type::INT64;
    if wide {
        let mut labels = guarded(|| column::<Int64Type>(&file, &metadata, group, label)).map_err(&unreadable)?;
        for (_, label) in &mut found {
            *label = guarded(|| next(&mut labels)).map_err(&unreadable)?;
        }
    } else {
        let mut labels = guarded(|| column::<Int32Type>(&file, &metadata, group, label)).map_err(&unreadable)?;
        for (_, label) in &mut found {
            *label = guarded(|| next(&mut labels)).map_err(&unreadable)?.map(i64::from);
        }
    }
    Ok(found)
}
