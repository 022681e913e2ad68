//! Compiles every `kernels/S.cu` to PTX, assembles machine code from it, and writes the table of entries, `kernels.rs`
//! in OUT_DIR, that `src/kernels.rs` includes.
//!
//! The compiler is the first of: `NVCC`, `CUDA_HOME` or `CUDA_PATH`, PATH, /usr/local/cuda, one fetched earlier.
//! `DDPM_CUDA_TOOLCHAIN` says what happens without one: `auto` (default) fetches NVIDIA's wheels with pip where an
//! NVIDIA driver is present and otherwise builds for the CPU only; `fetch` always fetches. `none` builds for the CPU
//! only even where there is a compiler. A fetch is announced before it begins; the wheels are pinned by their hashes.
//!
//! The list of entries is read from the CUDA source, so the crate's code is the same with and without a compiler; with
//! one, the PTX must have exactly those entries. A file is compiled again when it, a header, the compiler or the flags
//! change. Needs no GPU.
//!
//! What a kernel and its launch share is written once, in CUDA: a `struct` of plain numbers or a `constexpr` below a
//! comment that begins with `Host twin:` gets a twin in Rust, in the module of its file (see [`twins`]).

use std::collections::{BTreeMap, hash_map::DefaultHasher};
use std::hash::{Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

type Result<T> = std::result::Result<T, String>;

/// Compute capability that the PTX targets: it runs on this and on everything newer.
const CAPABILITY: (u32, u32) = (8, 0);

/// Compute capabilities for which machine code is assembled from the PTX, as far as the assembler knows them: A100, RTX
/// 30, RTX 40, H100, B200 and RTX 50. The driver compiles the PTX for others, at a kernel's first launch.
const MACHINE_CODE: [(u32, u32); 6] = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)];

/// nvcc's flags; the architecture is [`CAPABILITY`].
const FLAGS: [&str; 5] = ["-ptx", "-arch=compute_80", "-std=c++17", "-O3", "-Ikernels/include"];

/// PTX versions to try, lowest first. 8.0 belongs to CUDA 12.0, the oldest supported driver.
const PTX_VERSIONS: [&str; 10] = ["7.0", "7.1", "7.2", "7.3", "7.4", "7.5", "7.6", "7.7", "7.8", "8.0"];

/// A wheel on PyPI.
struct Wheel {
    name: &'static str,
    version: &'static str,
    /// SHA-256 of the file for Linux on x86-64, for Linux on aarch64 and for Windows; there are no others.
    sha256: [&'static str; 3],
}

/// NVIDIA's compiler as wheels, installed by `python3 -m pip install --target`. The hashes are those of PyPI, read on
/// 26 November 2026; pip refuses a file with another one.
const WHEELS: [Wheel; 5] = [
    Wheel {
        name: "nvidia-cuda-nvcc",
        version: "13.5.37",
        sha256: [
            "f5c4f7ead5d964fb4af42bbf1e6d3ec3c1e6e9d83b53749f691d387e7fcaa3a7",
            "588eda18eb5076ae859fe272844b526459228af22df0b117f54eec3aa82bc9c8",
            "2e33114ed3109eabfaa820cf8ddd534d0b98c47065f8390a56e6eaae04dcca31",
        ],
    },
    Wheel {
        name: "nvidia-nvvm",
        version: "13.5.37",
        sha256: [
            "c41bfa362e407405163f103c2229f0765f8cc2ed7d148b754dc77f228bf7e070",
            "b659bd3115b7ac7ec8931e67d0e2c0dd09cd35b08a6a7372df6f8f22c67da80a",
            "9422cd190cedabca85f88de6674e0ee16f508915698517e04bfaf193f1809c21",
        ],
    },
    Wheel {
        name: "nvidia-cuda-crt",
        version: "13.5.37",
        sha256: [
            "e898b7f73d3035fa89915a3f7bf3b54a73e90249746111aed295822c4729bb29",
            "9ed2c565fdf3244fa6719769a80a466b85bfd4b1467ea339353bc91c971d09e0",
            "30cded98a895e80586b4e233afd4e09e511205c767f1921a28710900a2399818",
        ],
    },
    Wheel {
        name: "nvidia-cuda-runtime",
        version: "13.5.37",
        sha256: [
            "df2b79a8852f10d1fef8c848489c49eebb5754051bf870202a862831412b179d",
            "de2dc5a7367974228b0a69588a9acc9340d3768bef1bf38bf0801eb08497cd2d",
            "f225d3fa5ea6bfbb58fc4979ef72375cbe661d9107f0d8a4ff22cc151525e4a9",
        ],
    },
    Wheel {
        name: "nvidia-cuda-cccl",
        version: "13.3.5.0.6",
        sha256: [
            "d5230098fa2df5021e1a00c0c4eee41797671a91119d31e892463e5ccf3ee326",
            "6f30b8076b3e69951c459c94ae190bde51924b320076ebaec376d36848b4c76e",
            "6e1f96b71d582171cebd9ae1d7ffbfc726e112a0a41aef77b9ead500aad7e0a2",
        ],
    },
];

fn main() {
    if let Err(what) = build() {
        // Cargo shows what a failed build script wrote to stderr.
        eprintln!("\nddpm-cuda: {what}\n");
        std::process::exit(1);
    }
}

fn build() -> Result<()> {
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "DDPM_CUDA_TOOLCHAIN"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    let headers = headers()?;
    let sources = sources(&headers)?;
    let compiler = find_compiler(&out)?;
    if env::var_os("CARGO_FEATURE_STEPS").is_some() {
        steps(compiler.as_ref(), &out)?;
    }
    let mut stems = Vec::new();
    match &compiler {
        Some(compiler) => {
            let ptx = compile(compiler, &sources, &out)?;
            for (source, ptx) in sources.into_iter().zip(ptx) {
                let compiled = entries_of_ptx(&read(&ptx)?)?;
                let entries = check(&source, &compiled)?;
                stems.push(Stem { name: source.stem, ptx: Some(ptx), entries, twins: source.twins });
            }
        }
        None => {
            for source in sources {
                stems.push(Stem { name: source.stem, ptx: None, entries: source.entries, twins: source.twins });
            }
        }
    }
    let table = table(compiler.as_ref(), &headers, &stems)?;
    write(&out.join("kernels.rs"), &table)
}

/// One kernels/S.cu.
struct Source {
    stem: String,
    path: PathBuf,
    entries: BTreeMap<String, Entry>,
    twins: Vec<Twin>,
}

/// One kernels/include/H.cuh.
struct Header {
    stem: String,
    twins: Vec<Twin>,
}

/// A CUDA definition that is repeated in Rust.
struct Twin {
    name: String,
    /// The comment above it.
    doc: String,
    what: What,
}

enum What {
    /// Fields, size and alignment.
    Struct(Vec<Field>, Extent),
    /// Rust type and value.
    Constant(&'static str, String),
}

/// Size and alignment in bytes.
#[derive(Clone, Copy)]
struct Extent {
    size: u32,
    align: u32,
}

/// Name, Rust type and trailing comment.
struct Field {
    name: String,
    rust: String,
    doc: String,
}

/// Parameters and launch bound of an entry.
#[derive(Clone, Default)]
struct Entry {
    params: Vec<Param>,
    /// From the PTX; 0 without a compiler.
    max_threads: u32,
}

/// A parameter of an entry.
#[derive(Clone)]
struct Param {
    name: String,
    /// Its `kernels::Kind`, as Rust text.
    kind: String,
    bytes: u32,
}

fn headers() -> Result<Vec<Header>> {
    let mut headers = Vec::new();
    for path in files(Path::new("kernels/include"), "cuh")? {
        let twins = twins(&read(&path)?).map_err(|what| format!("{}: {what}", path.display()))?;
        headers.push(Header { stem: stem(&path)?, twins });
    }
    Ok(headers)
}

fn stem(path: &Path) -> Result<String> {
    let stem = path.file_stem().and_then(|s| s.to_str());
    stem.map(str::to_string).ok_or_else(|| format!("{}: is not named in UTF-8", path.display()))
}

/// The definitions below a comment `// Host twin: ...`, whose text becomes the documentation in Rust:
///
/// ```cuda
/// // Host twin: what it is.
/// struct Name {
///     unsigned a, b;       // what they are
///     double c[QUARTERS];  // `QUARTERS` is a constant with a twin, or a number
/// };
///
/// // Host twin: what it is.
/// constexpr int NAME = 64;
/// ```
///
/// A struct has fields of 4 and 8 bytes, arrays of them or structs with twins, ordered so that there is no padding and
/// C++ and Rust lay it out alike. It has nothing else, no functions.
fn twins(text: &str) -> Result<Vec<Twin>> {
    let mut twins: Vec<Twin> = Vec::new();
    for part in text.split("// Host twin:").skip(1) {
        let mut lines = part.lines();
        let mut doc = lines.next().unwrap_or_default().trim().to_string();
        if let Some(first) = doc.get_mut(..1) {
            first.make_ascii_uppercase();
        }
        let mut definition = lines.next().unwrap_or_default();
        while let Some(more) = definition.strip_prefix("//") {
            doc = format!("{doc} {}", more.trim());
            definition = lines.next().unwrap_or_default();
        }
        let unknown = || format!("no struct or constexpr that can have a twin: {definition}");
        if let Some(rest) = definition.strip_prefix("constexpr ") {
            let (kind, rest) = rest.split_once(' ').ok_or_else(unknown)?;
            let (name, value) = rest.trim_end_matches(';').split_once(" = ").ok_or_else(unknown)?;
            let rust = match kind {
                "int" | "unsigned" => "u32",
                "size_t" => "usize",
                _ => return Err(unknown()),
            };
            value.parse::<u32>().map_err(|_| unknown())?;
            twins.push(Twin { name: name.into(), doc, what: What::Constant(rust, value.into()) });
        } else {
            let name = definition.strip_prefix("struct ").and_then(|rest| rest.strip_suffix(" {"));
            let name = name.ok_or_else(unknown)?.to_string();
            let fields = fields(lines.take_while(|line| *line != "};"), &twins);
            let (fields, extent) = fields.map_err(|what| format!("struct {name}: {what}"))?;
            twins.push(Twin { name, doc, what: What::Struct(fields, extent) });
        }
    }
    Ok(twins)
}

/// The fields of a struct and its size and alignment.
fn fields<'a>(lines: impl Iterator<Item = &'a str>, known: &[Twin]) -> Result<(Vec<Field>, Extent)> {
    let (mut fields, mut whole) = (Vec::new(), Extent { size: 0, align: 1 });
    for line in lines {
        let (code, doc) = line.split_once("//").unwrap_or((line, ""));
        let unknown = || format!("a twin has no field like {}", line.trim());
        let (kind, names) = code.trim().strip_suffix(';').and_then(|c| c.split_once(' ')).ok_or_else(unknown)?;
        let number = |bytes| Extent { size: bytes, align: bytes };
        let (rust, extent) = match kind {
            "unsigned" | "uint32_t" => ("u32", number(4)),
            "int" | "int32_t" => ("i32", number(4)),
            "size_t" | "uint64_t" => ("u64", number(8)),
            "float" => ("f32", number(4)),
            "double" => ("f64", number(8)),
            name => (name, extent_of(known, name).ok_or_else(unknown)?),
        };
        for name in names.split(',').map(str::trim) {
            let (name, count) = match name.split_once('[') {
                Some((name, count)) => (name, Some(count.trim_end_matches(']'))),
                None => (name, None),
            };
            let times = match count {
                None => 1,
                Some(count) => count.parse().ok().or_else(|| value_of(known, count)).ok_or_else(unknown)?,
            };
            if whole.size % extent.align != 0 {
                return Err(format!("{name} would begin at byte {}: C++ leaves a gap before it", whole.size));
            }
            whole = Extent { size: whole.size + extent.size * times, align: whole.align.max(extent.align) };
            let rust = count.map_or(rust.to_string(), |_| format!("[{rust}; {times}]"));
            fields.push(Field { name: name.into(), rust, doc: doc.trim().into() });
        }
    }
    if whole.size % whole.align != 0 {
        return Err(format!("C++ leaves a gap behind its {} bytes", whole.size));
    }
    Ok((fields, whole))
}

/// Size and alignment of a struct with a twin.
fn extent_of(twins: &[Twin], name: &str) -> Option<Extent> {
    twins.iter().find_map(|twin| match twin.what {
        What::Struct(_, extent) if twin.name == name => Some(extent),
        _ => None,
    })
}

/// Value of a constant with a twin.
fn value_of(twins: &[Twin], name: &str) -> Option<u32> {
    twins.iter().find_map(|twin| match &twin.what {
        What::Constant(_, value) if twin.name == name => value.parse().ok(),
        _ => None,
    })
}

fn sources(headers: &[Header]) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    for path in files(Path::new("kernels"), "cu")? {
        let stem = stem(&path)?;
        let failed = |what| format!("{}: {what}", path.display());
        let text = read(&path)?;
        let twins = twins(&text).map_err(failed)?;
        let bytes = |name: &str| {
            let in_headers = || headers.iter().find_map(|header| extent_of(&header.twins, name));
            extent_of(&twins, name).or_else(in_headers).map(|extent| extent.size)
        };
        let entries = entries_of_source(&text, bytes).map_err(failed)?;
        for name in entries.keys() {
            if !name.strip_prefix(&stem).is_some_and(|rest| rest.starts_with('_')) {
                return Err(failed(format!("the entry {name} is not named {stem}_PART")));
            }
        }
        sources.push(Source { stem, path, entries, twins });
    }
    Ok(sources)
}

/// Compiles the ladder, kernels/steps, and tells its tests where the PTX is. The program has none of it.
fn steps(compiler: Option<&Compiler>, out: &Path) -> Result<()> {
    let compiler = compiler.ok_or("the feature steps needs a CUDA compiler: set DDPM_CUDA_TOOLCHAIN=fetch or NVCC")?;
    let source = |path: PathBuf| Ok(Source { stem: stem(&path)?, path, entries: BTreeMap::new(), twins: Vec::new() });
    let sources = files(Path::new("kernels/steps"), "cu")?.into_iter().map(source).collect::<Result<Vec<_>>>()?;
    compile(compiler, &sources, out)?;
    println!("cargo:rustc-env=DDPM_CUDA_STEPS={}", out.display());
    Ok(())
}

/// The entries that a source declares as `__global__ void __launch_bounds__(N) NAME(TYPE NAME, ...)`. `NAME_##suffix`
/// stands for two, f32 and bf16; `##D##` in a name, in a macro M, for one per number N in the `M(N` of the text.
/// `bytes` gives the size of a struct that has a twin.
fn entries_of_source(text: &str, bytes: impl Fn(&str) -> Option<u32>) -> Result<BTreeMap<String, Entry>> {
    let text = text.replace("\\\n", " ");
    let mut entries = BTreeMap::new();
    for (at, start) in text.match_indices("__global__ void __launch_bounds__(") {
        let (line, declaration) = (text[..at].lines().next_back().unwrap_or_default(), &text[at + start.len()..]);
        let of_macro = line.strip_prefix("#define ").and_then(|rest| rest.split_once('('));
        let (name, rest) = (declaration.split_once(") "))
            .and_then(|(_, after)| after.split_once('('))
            .ok_or("an entry is not declared as __global__ void __launch_bounds__(N) NAME(...)")?;
        let (params, _) = rest.split_once(')').ok_or_else(|| format!("the parameters of {name} do not end"))?;
        let params = params.split(',').map(str::trim).filter(|param| !param.is_empty());
        let params = params.map(|param| {
            parameter(param, &bytes).ok_or_else(|| format!("{name}: the launcher knows no parameter like {param}"))
        });
        let entry = Entry { params: params.collect::<Result<_>>()?, max_threads: 0 };
        let sized = match name.trim().split_once("##D##") {
            Some((head, tail)) => {
                let (of, _) = of_macro.ok_or_else(|| format!("{name} is not in a macro"))?;
                let of = format!("{of}(");
                let uses = text.split(&of).skip(1).filter_map(|rest| rest.split([',', ')']).next());
                uses.filter(|size| size.parse::<u32>().is_ok()).map(|size| format!("{head}{size}{tail}")).collect()
            }
            None => vec![name.trim().to_string()],
        };
        for name in sized {
            match name.strip_suffix("##suffix") {
                Some(name) => entries.extend(["f32", "bf16"].map(|suffix| (format!("{name}{suffix}"), entry.clone()))),
                None => entries.extend([(name, entry.clone())]),
            }
        }
    }
    Ok(entries)
}

/// The parameter `TYPE NAME`.
fn parameter(declaration: &str, bytes: &impl Fn(&str) -> Option<u32>) -> Option<Param> {
    let qualifiers = ["const", "__restrict__"];
    let words: Vec<&str> = declaration.split_whitespace().filter(|word| !qualifiers.contains(word)).collect();
    let (name, words) = words.split_last()?;
    let (kind, bytes) = match words.join(" ").as_str() {
        pointer if pointer.ends_with('*') || name.starts_with('*') => {
            let reads = declaration.split_whitespace().any(|word| word == "const");
            (if reads { "Pointer" } else { "PointerMut" }.into(), 8)
        }
        "size_t" | "unsigned long long" | "long long" => ("U64".into(), 8),
        "unsigned" | "int" => ("U32".into(), 4),
        "float" => ("F32".into(), 4),
        "double" => ("F64".into(), 8),
        name => {
            let bytes = bytes(name)?;
            (format!("Struct({name:?}, {bytes})"), bytes)
        }
    };
    Some(Param { name: name.trim_start_matches('*').to_string(), kind, bytes })
}

/// Parameter sizes in bytes and launch bound of each entry of a PTX text.
fn entries_of_ptx(text: &str) -> Result<BTreeMap<String, (Vec<u32>, u32)>> {
    let mut entries = BTreeMap::new();
    for part in text.split(".entry ").skip(1) {
        let (name, rest) = part.split_once('(').ok_or("an .entry without parameters")?;
        let (params, rest) = rest.split_once(')').ok_or("an .entry whose parameters do not end")?;
        let params = params.split(',').map(str::trim).filter(|param| !param.is_empty());
        // `.param .u32 NAME`, or `.param .align 4 .b8 NAME[BYTES]` for a struct.
        let sizes = params.map(|param| match param.split_whitespace().nth(1) {
            Some(".u64" | ".b64" | ".s64" | ".f64") => 8,
            Some(".u32" | ".b32" | ".s32" | ".f32") => 4,
            Some(".align") => {
                let bytes = param.split_once('[').and_then(|(_, rest)| rest.strip_suffix(']'));
                bytes.and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
            }
            _ => 0,
        });
        // After the parameters: `.maxntid X[, Y, Z]`.
        let head = rest.split('{').next().unwrap_or_default();
        let bound = head.split(".maxntid").nth(1).and_then(|b| b.split([',', '\n']).next());
        let bound = bound.and_then(|b| b.trim().parse().ok()).ok_or_else(|| format!("{name} has no launch bound"))?;
        entries.insert(name.trim().to_string(), (sizes.collect(), bound));
    }
    Ok(entries)
}

/// The declared entries, which must be those of the PTX, with their launch bounds from there.
fn check(source: &Source, compiled: &BTreeMap<String, (Vec<u32>, u32)>) -> Result<BTreeMap<String, Entry>> {
    let file = source.path.display();
    let (declared, found): (Vec<_>, Vec<_>) = (source.entries.keys().collect(), compiled.keys().collect());
    if declared != found {
        return Err(format!("{file} declares the entries {declared:?}, its PTX has {found:?}"));
    }
    let mut entries = source.entries.clone();
    for (name, entry) in &mut entries {
        let (sizes, max_threads) = &compiled[name];
        let declared: Vec<u32> = entry.params.iter().map(|param| param.bytes).collect();
        if declared != *sizes {
            return Err(format!(
                "{file}: {name} is declared with parameters of {declared:?} bytes, its PTX has {sizes:?}"
            ));
        }
        entry.max_threads = *max_threads;
    }
    Ok(entries)
}

struct Compiler {
    nvcc: PathBuf,
    ptxas: PathBuf,
    fatbinary: PathBuf,
    version: String,
    /// Those of [`MACHINE_CODE`] that it knows.
    machine_code: Vec<(u32, u32)>,
}

impl Compiler {
    /// The compiler at `nvcc`, if it runs.
    fn at(nvcc: PathBuf) -> Option<Self> {
        let output = Command::new(&nvcc).arg("--version").output().ok().filter(|o| o.status.success())?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text.split("release ").nth(1)?.split(',').next()?.to_string();
        // One code a line: sm_80.
        let codes = Command::new(&nvcc).arg("--list-gpu-code").output().map(|o| o.stdout).unwrap_or_default();
        let codes = String::from_utf8_lossy(&codes).into_owned();
        let known = |&(major, minor): &(u32, u32)| codes.lines().any(|code| code == format!("sm_{major}{minor}"));
        // A bare name was found on PATH, where the others are too.
        Some(Compiler {
            ptxas: nvcc.with_file_name("ptxas"),
            fatbinary: nvcc.with_file_name("fatbinary"),
            nvcc,
            version,
            machine_code: MACHINE_CODE.into_iter().filter(known).collect(),
        })
    }
}

/// The compiler to use; `None` to build for the CPU only.
fn find_compiler(out: &Path) -> Result<Option<Compiler>> {
    let wanted = env::var("DDPM_CUDA_TOOLCHAIN").unwrap_or_default();
    if !["", "auto", "fetch", "none"].contains(&wanted.as_str()) {
        return Err(format!("DDPM_CUDA_TOOLCHAIN is '{wanted}': use auto, fetch or none"));
    }
    // Without the feature `cuda` nothing could launch a kernel.
    if wanted == "none" || env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(None);
    }
    let folder = toolchain_folder(out)?;
    let fetched = folder.join("nvidia/cu13/bin/nvcc");
    if let Some(nvcc) = env::var_os("NVCC").filter(|nvcc| !nvcc.is_empty()) {
        let nvcc = PathBuf::from(nvcc);
        let named = nvcc.display().to_string();
        return Compiler::at(nvcc).map(Some).ok_or(format!("NVCC is {named}, which does not run as a CUDA compiler"));
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).filter(|home| !home.is_empty());
    let candidates = (homes.map(|home| Path::new(&home).join("bin/nvcc"))).chain([
        "nvcc".into(),
        "/usr/local/cuda/bin/nvcc".into(),
        fetched.clone(),
    ]);
    for candidate in candidates {
        if let Some(compiler) = Compiler::at(candidate.clone()) {
            // Older compilers do not know PTX 8.0 or lack what the headers need.
            if compiler.version.split('.').next().and_then(|v| v.parse().ok()).is_some_and(|major: u32| major >= 12) {
                return Ok(Some(compiler));
            }
            println!("cargo:warning={} is CUDA {}: 12.0 or newer is needed", candidate.display(), compiler.version);
        }
    }
    let driver = ["/proc/driver/nvidia/version", "/usr/lib/wsl/lib/libcuda.so.1"].iter().any(|p| Path::new(p).exists());
    if wanted != "fetch" && !driver {
        println!(
            "cargo:warning=no CUDA compiler found: this build computes on the CPU only (DDPM_CUDA_TOOLCHAIN=fetch \
             installs one into the target folder, about 180 MB)"
        );
        return Ok(None);
    }
    let why = if wanted == "fetch" { "DDPM_CUDA_TOOLCHAIN=fetch asks for it" } else { "there is an NVIDIA driver" };
    match fetch(&folder, why)
        .and_then(|()| Compiler::at(fetched).ok_or_else(|| "the fetched compiler does not run".into()))
    {
        Ok(compiler) => Ok(Some(compiler)),
        Err(what) if wanted == "fetch" => Err(what),
        Err(what) => {
            println!(
                "cargo:warning=no CUDA compiler ({what}): this build computes on the CPU only; with \
                 DDPM_CUDA_TOOLCHAIN=none it does not try"
            );
            Ok(None)
        }
    }
}

/// Where a fetched compiler goes: the target folder, shared by all profiles.
fn toolchain_folder(out: &Path) -> Result<PathBuf> {
    // OUT_DIR is TARGET/PROFILE/build/ddpm-cuda-HASH/out.
    let target = out.ancestors().nth(4).ok_or("OUT_DIR is not in a target folder")?;
    Ok(target.join("cuda-toolchain-13.5.37"))
}

/// Installs the compiler's wheels beside `folder`, then renames: an interrupted fetch leaves nothing that looks
/// complete. Says so first, with the reason, `why`.
fn fetch(folder: &Path, why: &str) -> Result<()> {
    let notice = format!(
        "fetching NVIDIA's CUDA compiler, about 180 MB from PyPI by pip, into {}, since {why}; DDPM_CUDA_TOOLCHAIN=none \
         builds for the CPU alone and fetches nothing",
        folder.display()
    );
    // Cargo shows warnings of a build script when it has ended, and those of a package from a registry not at all; what
    // goes to the terminal is seen before the fetch begins.
    println!("cargo:warning={notice}");
    tell_terminal(&notice);
    let partial = folder.with_extension("partial");
    let _ = fs::remove_dir_all(&partial);
    fs::create_dir_all(&partial).map_err(|e| format!("{}: cannot be created: {e}", partial.display()))?;
    // pip takes hashes from a file of requirements only. Any of a line's hashes will do: one is this platform's.
    let requirements = partial.join("requirements.txt");
    let line = |Wheel { name, version, sha256 }: &Wheel| {
        let hashes: String = sha256.iter().map(|hash| format!(" --hash=sha256:{hash}")).collect();
        format!("{name}=={version}{hashes}\n")
    };
    write(&requirements, &WHEELS.iter().map(line).collect::<String>())?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "--require-hashes"])
        .args(["--only-binary", ":all:", "--target"])
        .arg(&partial)
        .arg("--requirement")
        .arg(&requirements);
    let output = pip.output().map_err(|e| format!("python3, which installs NVIDIA's compiler, does not run: {e}"))?;
    if !output.status.success() {
        return Err(refusal(&String::from_utf8_lossy(&output.stderr)));
    }
    let _ = fs::remove_dir_all(folder);
    fs::rename(&partial, folder).map_err(|e| format!("{}: cannot be renamed: {e}", partial.display()))
}

/// What pip said, in one sentence.
fn refusal(said: &str) -> String {
    let wheel = said.lines().find_map(|line| line.trim().strip_prefix("nvidia-")).and_then(|l| l.split(' ').next());
    if said.contains("DO NOT MATCH THE HASHES") {
        let wheel = wheel.map_or("a wheel".into(), |name| format!("nvidia-{name}"));
        return format!(
            "NVIDIA's compiler is not installed: the {wheel} that pip received is not the file whose SHA-256 build.rs \
             names, so it was changed on the way or there"
        );
    }
    // The last of pip's errors sums up the others.
    let mut errors = said.lines().filter_map(|line| line.trim().strip_prefix("ERROR: "));
    let why = errors.next_back().or(said.lines().last()).unwrap_or("it said nothing").trim().trim_end_matches('.');
    format!("NVIDIA's compiler could not be installed by python3 -m pip: {why}")
}

/// Writes to the terminal that the build runs in, if there is one: cargo keeps what a build script prints.
fn tell_terminal(text: &str) {
    if cfg!(unix)
        && let Ok(mut terminal) = fs::OpenOptions::new().write(true).open("/dev/tty")
    {
        let _ = writeln!(terminal, "ddpm-cuda: {text}");
    }
}

/// Compiles what has changed, one thread per job that cargo allows, and returns the paths of all PTX files.
fn compile(compiler: &Compiler, sources: &[Source], out: &Path) -> Result<Vec<PathBuf>> {
    let mut common = DefaultHasher::new();
    (FLAGS, PTX_VERSIONS, &compiler.nvcc, &compiler.version, &compiler.machine_code).hash(&mut common);
    for header in files(Path::new("kernels/include"), "cuh")? {
        (&header, read(&header)?).hash(&mut common);
    }
    let common = common.finish();
    let ptx: Vec<PathBuf> = sources.iter().map(|source| out.join(format!("{}.ptx", source.stem))).collect();
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize).max(1);
    let pending: Vec<_> = sources.iter().zip(&ptx).collect();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let work = || -> Result<()> {
        while let Some((source, ptx)) = pending.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
            let mut hash = DefaultHasher::new();
            (common, read(&source.path)?).hash(&mut hash);
            let (stamp, hash) = (ptx.with_extension("hash"), format!("{:016x}", hash.finish()));
            let assembled = compiler.machine_code.iter().all(|&code| said_of(ptx, code).exists());
            let there = ptx.exists() && ptx.with_extension("fatbin").exists() && assembled;
            if there && fs::read_to_string(&stamp).is_ok_and(|old| old == hash) {
                continue;
            }
            compile_one(compiler, &source.path, ptx)?;
            write(&stamp, &hash)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|w| w.join().map_err(|_| "a compiling thread panicked".to_string())?)
    })?;
    Ok(ptx)
}

fn compile_one(compiler: &Compiler, source: &Path, ptx: &Path) -> Result<()> {
    let raw = ptx.with_extension("raw.ptx");
    run(Command::new(&compiler.nvcc).args(FLAGS).arg(source).arg("-o").arg(&raw))?;
    // nvcc declares the newest PTX version it knows, which older drivers refuse; the code itself needs a far older one.
    let text = read(&raw)?;
    let (head, rest) = text.split_once(".version ").ok_or("PTX without a .version")?;
    let (_, rest) = rest.split_once('\n').ok_or("PTX that ends with its .version")?;
    let assemble = |(major, minor)| {
        let cubin = ptx.with_extension(format!("sm_{major}{minor}.cubin"));
        let ptxas = &mut Command::new(&compiler.ptxas);
        let said = run(ptxas.arg("-v").arg(format!("-arch=sm_{major}{minor}")).arg("-o").arg(&cubin).arg(ptx))?;
        write(&said_of(ptx, (major, minor)), &said)?;
        Ok(cubin)
    };
    let mut refusal = String::new();
    for version in PTX_VERSIONS {
        write(ptx, &format!("{head}.version {version}\n{rest}"))?;
        match assemble(CAPABILITY) {
            Ok(_) => return fatbin(compiler, ptx, assemble),
            Err(why) => refusal = why,
        }
    }
    let _ = fs::remove_file(ptx);
    Err(format!("{}: ptxas accepts its PTX in no version up to 8.0: {refusal}", source.display()))
}

/// Where it is kept what `ptxas -v` said of a module for a compute capability.
fn said_of(ptx: &Path, (major, minor): (u32, u32)) -> PathBuf {
    ptx.with_extension(format!("sm_{major}{minor}.said"))
}

/// Registers of a thread and bytes of static shared memory of each entry, from what `ptxas -v` said:
///
/// ```text
/// ptxas info    : Function properties for add_fwd_f32
///     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
/// ptxas info    : Used 24 registers, used 1 barriers, 2048 bytes smem
/// ```
fn resources(said: &str) -> Result<BTreeMap<String, [u32; 3]>> {
    let of_entry = |part: &str| {
        let (name, rest) = part.split_once('\n')?;
        // Bytes of the stack, of spill stores and of spill loads.
        let mut local = 0;
        for bytes in rest.lines().next()?.split(',') {
            local += bytes.split_whitespace().next()?.parse::<u32>().ok()?;
        }
        let used = rest.lines().find_map(|line| line.split_once("Used "))?.1;
        let number = |what: &str| used.split(',').find_map(|part| part.trim().strip_suffix(what)?.trim().parse().ok());
        Some((name.trim().to_string(), [number("registers")?, number("bytes smem").unwrap_or(0), local]))
    };
    let parts = said.split("Function properties for ").skip(1);
    let unknown = |part: &str| format!("ptxas does not say what an entry uses, but: {part}");
    parts.map(|part| of_entry(part).ok_or_else(|| unknown(part))).collect()
}

/// Assembles machine code and packs it into one file, `S.fatbin` beside the PTX. Compressed as every driver can read
/// it: what newer compilers do by default (zstd) needs a newer driver; older compilers have one way and no option.
fn fatbin(compiler: &Compiler, ptx: &Path, assemble: impl Fn((u32, u32)) -> Result<PathBuf>) -> Result<()> {
    let to = ptx.with_extension("fatbin");
    let mut images = Vec::new();
    for &(major, minor) in &compiler.machine_code {
        let cubin = assemble((major, minor))?;
        images.push(format!("--image3=kind=elf,sm={major}{minor},file={}", cubin.display()));
    }
    let pack = |options: &[&str]| {
        let command = &mut Command::new(&compiler.fatbinary);
        run(command.args(["--64", "--compress-all"]).args(options).arg("--create").arg(&to).args(&images))
    };
    pack(&["--compress-mode=speed"]).or_else(|_| pack(&[])).map(|_| ())
}

/// Runs a command and returns what it said.
fn run(command: &mut Command) -> Result<String> {
    let output = command.output().map_err(|e| format!("{} does not run: {e}", command.get_program().display()))?;
    let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
    if output.status.success() { Ok(said) } else { Err(format!("{command:?}\n{said}")) }
}

struct Stem {
    name: String,
    ptx: Option<PathBuf>,
    entries: BTreeMap<String, Entry>,
    twins: Vec<Twin>,
}

/// The Rust text: a module for each header with twins, and a module for each stem with its twins and a static per entry
/// or pair of entries.
fn table(compiler: Option<&Compiler>, headers: &[Header], stems: &[Stem]) -> Result<String> {
    let (version, ptxas) = (compiler.map(|c| &c.version), compiler.map(|c| &c.ptxas));
    let machine_code = compiler.map_or(&[][..], |c| &c.machine_code);
    let mut text = format!(
        "/// CUDA version of the compiler that made the PTX.\npub const COMPILER: Option<&str> = {version:?};\n\
         /// Its assembler.\npub const PTXAS: Option<&str> = {ptxas:?};\n\
         /// Compute capabilities with machine code.\npub const MACHINE_CODE: &[(u32, u32)] = &{machine_code:?};\n"
    );
    for Header { stem, twins } in headers.iter().filter(|header| !header.twins.is_empty()) {
        text += &format!("/// Twins of kernels/include/{stem}.cuh.\npub mod {stem} {{\n");
        if twins.iter().any(|twin| matches!(twin.what, What::Struct(..))) {
            text += "    use super::Twin;\n";
        }
        twins.iter().for_each(|twin| text += &twin_text(twin));
        text += "}\n";
    }
    let mut all = Vec::new();
    for stem in stems {
        let name = &stem.name;
        let (images, fatbin) = match &stem.ptx {
            Some(path) => (
                format!("Image {{ capability: {CAPABILITY:?}, ptx: include_str!({path:?}) }}"),
                format!("include_bytes!({:?})", path.with_extension("fatbin")),
            ),
            None => (String::new(), "&[]".into()),
        };
        text += &format!(
            "/// Entries of kernels/{name}.cu.\npub mod {name} {{\n    use super::*;\n    \
             pub(super) static MODULE: Module = Module {{ stem: {name:?}, images: &[{images}], fatbin: {fatbin} }};\n"
        );
        stem.twins.iter().for_each(|twin| text += &twin_text(twin));
        let by_code = match &stem.ptx {
            Some(ptx) => {
                machine_code.iter().map(|&code| resources(&read(&said_of(ptx, code))?)).collect::<Result<_>>()?
            }
            None => Vec::new(),
        };
        let kernel = |entry: &str| {
            let Entry { params, max_threads } = &stem.entries[entry];
            let params: String =
                params.iter().map(|Param { kind, name, .. }| format!("(Kind::{kind}, {name:?}), ")).collect();
            let tile = tile(entry);
            let of_code = |of: &BTreeMap<String, [u32; 3]>| {
                let [registers, shared, local] = of[entry];
                format!("Resources {{ registers: {registers}, shared: {shared}, local: {local} }}, ")
            };
            let resources: String = by_code.iter().map(of_code).collect();
            format!(
                "Kernel {{ name: {entry:?}, module: &MODULE, params: &[{params}], max_threads: {max_threads}, \
                 tile: {tile:?}, resources: &[{resources}] }}"
            )
        };
        for entry in stem.entries.keys() {
            let part = &entry[name.len() + 1..];
            let constant = part.to_uppercase();
            if let Some(pair) = constant.strip_suffix("_BF16") {
                let single = entry.strip_suffix("bf16").unwrap_or(entry);
                let f32_entry = format!("{single}f32");
                if !stem.entries.contains_key(&f32_entry) {
                    return Err(format!("{entry} has no counterpart {f32_entry}"));
                }
                text += &format!(
                    "    /// `{single}*`\n    pub static {pair}: ByType = ByType {{ f32: {}, bf16: {} }};\n",
                    kernel(&f32_entry),
                    kernel(entry)
                );
                all.extend([format!("&{name}::{pair}.f32"), format!("&{name}::{pair}.bf16")]);
            } else if constant.ends_with("_F32")
                && stem.entries.contains_key(&format!("{}bf16", &entry[..entry.len() - 3]))
            {
                // Written with its bf16 counterpart.
            } else {
                text += &format!("    /// `{entry}`\n    pub static {constant}: Kernel = {};\n", kernel(entry));
                all.push(format!("&{name}::{constant}"));
            }
        }
        text += "}\n";
    }
    let modules: Vec<String> = stems.iter().map(|stem| format!("&{}::MODULE", stem.name)).collect();
    text += &format!("/// Every module.\npub static MODULES: &[&Module] = &[{}];\n", modules.join(", "));
    text += &format!("/// Every entry.\npub static ALL: &[&Kernel] = &[{}];\n", all.join(", "));
    Ok(text)
}

/// BM and BN of an entry whose name has a part `BMxBN`.
fn tile(entry: &str) -> Option<(u32, u32)> {
    entry.split('_').find_map(|part| part.split_once('x').and_then(|(m, n)| Some((m.parse().ok()?, n.parse().ok()?))))
}

/// A definition's twin, as Rust text.
fn twin_text(Twin { name, doc, what }: &Twin) -> String {
    match what {
        What::Constant(rust, value) => format!("    /// {doc}\n    pub const {name}: {rust} = {value};\n"),
        What::Struct(fields, extent) => {
            let field = |f: &Field| {
                let doc = if f.doc.is_empty() { String::new() } else { format!("/// {}\n        ", f.doc) };
                format!("        {doc}pub {}: {},\n", f.name, f.rust)
            };
            let (fields, size): (String, u32) = (fields.iter().map(field).collect(), extent.size);
            format!(
                "    /// {doc}\n    #[repr(C)]\n    \
                 #[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]\n    \
                 #[allow(missing_docs)]\n    pub struct {name} {{\n{fields}    }}\n    \
                 const _: () = assert!(size_of::<{name}>() == {size});\n    \
                 impl Twin for {name} {{\n        const NAME: &'static str = {name:?};\n    }}\n"
            )
        }
    }
}

/// Files of a folder with an extension, sorted.
fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(|e| format!("{}: cannot be read: {e}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == extension))
        .collect();
    paths.sort();
    Ok(paths)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|e| format!("{}: cannot be read: {e}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|e| format!("{}: cannot be written: {e}", path.display()))
}
