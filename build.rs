//! Compiles every `kernels/S.cu` to PTX and writes the table of entries, `kernels.rs` in OUT_DIR, that `src/kernels.rs` includes.
//!
//! The compiler is the first of: `NVCC`, `CUDA_HOME` or `CUDA_PATH`, PATH, /usr/local/cuda, one fetched earlier. `DDPM_CUDA_TOOLCHAIN`
//! says what happens without one: `auto` (default) fetches NVIDIA's wheels with pip where an NVIDIA driver is present and builds
//! for the CPU only elsewhere, `fetch` always fetches, `none` builds for the CPU only even where there is a compiler.
//!
//! Which entries there are is read from the source, so that the crate's code is the same with and without a compiler; with
//! one, the entries of the PTX must be just those. A file is compiled again when it, a header, the compiler or the flags change.
//! Never asks for a GPU.

use std::collections::{BTreeMap, hash_map::DefaultHasher};
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

type Result<T> = std::result::Result<T, String>;

/// What runs on compute capability 8.0 and everything newer.
const FLAGS: [&str; 5] = ["-ptx", "-arch=compute_80", "-std=c++17", "-O3", "-Ikernels/include"];

/// PTX versions to try, lowest first. 8.0 is CUDA 12.0's, the oldest driver supported.
const PTX_VERSIONS: [&str; 10] = ["7.0", "7.1", "7.2", "7.3", "7.4", "7.5", "7.6", "7.7", "7.8", "8.0"];

/// NVIDIA's compiler as wheels: `python3 -m pip install --target`.
const WHEELS: [&str; 5] = [
    "nvidia-cuda-nvcc==13.5.37",
    "nvidia-nvvm==13.5.37",
    "nvidia-cuda-crt==13.5.37",
    "nvidia-cuda-runtime==13.5.37",
    "nvidia-cuda-cccl==13.3.5.0.6",
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
    let sources = sources()?;
    let compiler = find_compiler(&out)?;
    let mut stems = Vec::new();
    match &compiler {
        Some(compiler) => {
            let ptx = compile(compiler, &sources, &out)?;
            for (source, ptx) in sources.iter().zip(ptx) {
                let compiled = entries_of_ptx(&read(&ptx)?)?;
                let entries = check(source, &compiled)?;
                stems.push(Stem { name: source.stem.clone(), ptx: Some(ptx), entries });
            }
        }
        None => {
            for source in &sources {
                stems.push(Stem { name: source.stem.clone(), ptx: None, entries: source.entries.clone() });
            }
        }
    }
    let table = table(compiler.as_ref(), &stems)?;
    write(&out.join("kernels.rs"), &table)
}

/// One kernels/S.cu.
struct Source {
    stem: String,
    path: PathBuf,
    entries: BTreeMap<String, Entry>,
}

/// Parameters and launch bound of an entry.
#[derive(Clone, Default)]
struct Entry {
    /// Each one's variant of `kernels::Kind` and name.
    params: Vec<(&'static str, String)>,
    /// As compiled; 0 without a compiler.
    max_threads: u32,
}

fn sources() -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    for path in files(Path::new("kernels"), "cu")? {
        let stem =
            path.file_stem().and_then(|s| s.to_str()).ok_or("a file of kernels/ is not named in UTF-8")?.to_string();
        let failed = |what| format!("{}: {what}", path.display());
        let entries = entries_of_source(&read(&path)?).map_err(failed)?;
        for name in entries.keys() {
            if !name.strip_prefix(&stem).is_some_and(|rest| rest.starts_with('_')) {
                return Err(failed(format!("the entry {name} is not named {stem}_PART")));
            }
        }
        sources.push(Source { stem, path, entries });
    }
    Ok(sources)
}

/// Entries that a source declares, by its text: `__global__ void __launch_bounds__(N) NAME(TYPE NAME, ...)`; `NAME_##suffix` stands for one
/// each of f32 and bf16, `##D##` in a name for each number N of the text's `OF_SIZE(N, suffix, T)`.
fn entries_of_source(text: &str) -> Result<BTreeMap<String, Entry>> {
    let text = text.replace("\\\n", " ");
    let sizes = text.split("OF_SIZE(").skip(1).filter_map(|rest| rest.split_once(", suffix, T)"));
    let sizes: Vec<&str> = sizes.map(|(size, _)| size).filter(|size| size.parse::<u32>().is_ok()).collect();
    let mut entries = BTreeMap::new();
    for declaration in text.split("__global__ void __launch_bounds__(").skip(1) {
        let (name, rest) = (declaration.split_once(") "))
            .and_then(|(_, after)| after.split_once('('))
            .ok_or("an entry is not declared as __global__ void __launch_bounds__(N) NAME(...)")?;
        let (params, _) = rest.split_once(')').ok_or_else(|| format!("the parameters of {name} do not end"))?;
        let params = params.split(',').map(str::trim).filter(|param| !param.is_empty());
        let params = params.map(|param| {
            parameter(param).ok_or_else(|| format!("{name}: the launcher knows no parameter like {param}"))
        });
        let entry = Entry { params: params.collect::<Result<_>>()?, max_threads: 0 };
        let sized = match name.trim().split_once("##D##") {
            Some((head, tail)) => sizes.iter().map(|size| format!("{head}{size}{tail}")).collect(),
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

/// Kind and name of `TYPE NAME`.
fn parameter(declaration: &str) -> Option<(&'static str, String)> {
    let words: Vec<&str> =
        declaration.split_whitespace().filter(|word| !["const", "__restrict__"].contains(word)).collect();
    let (name, words) = words.split_last()?;
    let kind = match words.join(" ").as_str() {
        pointer if pointer.ends_with('*') || name.starts_with('*') => "Pointer",
        "size_t" | "unsigned long long" | "long long" => "U64",
        "unsigned" | "int" => "U32",
        "float" => "F32",
        "double" => "F64",
        _ => return None,
    };
    Some((kind, name.trim_start_matches('*').to_string()))
}

/// Sizes of the parameters in bytes and launch bound of each entry of a PTX text.
fn entries_of_ptx(text: &str) -> Result<BTreeMap<String, (Vec<u32>, u32)>> {
    let mut entries = BTreeMap::new();
    for part in text.split(".entry ").skip(1) {
        let (name, rest) = part.split_once('(').ok_or("an .entry without parameters")?;
        let (params, rest) = rest.split_once(')').ok_or("an .entry whose parameters do not end")?;
        let params = params.split(',').map(str::trim).filter(|param| !param.is_empty());
        let sizes = params.map(|param| match param.split_whitespace().nth(1) {
            Some(".u64" | ".b64" | ".s64" | ".f64") => 8,
            Some(".u32" | ".b32" | ".s32" | ".f32") => 4,
            _ => 0,
        });
        // The first lines behind the parameters: .maxntid X[, Y, Z]
        let head = rest.split('{').next().unwrap_or_default();
        let bound = head.split(".maxntid").nth(1).and_then(|b| b.split([',', '\n']).next());
        let bound = bound.and_then(|b| b.trim().parse().ok()).ok_or_else(|| format!("{name} has no launch bound"))?;
        entries.insert(name.trim().to_string(), (sizes.collect(), bound));
    }
    Ok(entries)
}

/// The declared entries with their compiled launch bounds; they must be those of the PTX.
fn check(source: &Source, compiled: &BTreeMap<String, (Vec<u32>, u32)>) -> Result<BTreeMap<String, Entry>> {
    let file = source.path.display();
    let (declared, found): (Vec<_>, Vec<_>) = (source.entries.keys().collect(), compiled.keys().collect());
    if declared != found {
        return Err(format!("{file} declares the entries {declared:?}, its PTX has {found:?}"));
    }
    let mut entries = source.entries.clone();
    for (name, entry) in &mut entries {
        let (sizes, max_threads) = &compiled[name];
        let size = |kind: &str| if ["U32", "F32"].contains(&kind) { 4 } else { 8 };
        let declared: Vec<u32> = entry.params.iter().map(|(kind, _)| size(kind)).collect();
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
    version: String,
}

impl Compiler {
    /// The compiler at `nvcc`, if it runs.
    fn at(nvcc: PathBuf) -> Option<Self> {
        let output = Command::new(&nvcc).arg("--version").output().ok().filter(|o| o.status.success())?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text.split("release ").nth(1)?.split(',').next()?.to_string();
        // A bare name was found by PATH, and ptxas is there too.
        Some(Compiler { ptxas: nvcc.with_file_name("ptxas"), nvcc, version })
    }
}

/// The compiler to use; `None` to build for the CPU only.
fn find_compiler(out: &Path) -> Result<Option<Compiler>> {
    let wanted = env::var("DDPM_CUDA_TOOLCHAIN").unwrap_or_default();
    if !["", "auto", "fetch", "none"].contains(&wanted.as_str()) {
        return Err(format!("DDPM_CUDA_TOOLCHAIN is '{wanted}': use auto, fetch or none"));
    }
    if wanted == "none" {
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
            // Older ones know no PTX 8.0 or lack what the headers need.
            if compiler.version.split('.').next().and_then(|v| v.parse().ok()).is_some_and(|major: u32| major >= 12) {
                return Ok(Some(compiler));
            }
            println!("cargo:warning={} is CUDA {}: 12.0 or newer is needed", candidate.display(), compiler.version);
        }
    }
    let driver = ["/proc/driver/nvidia/version", "/usr/lib/wsl/lib/libcuda.so.1"].iter().any(|p| Path::new(p).exists());
    if wanted != "fetch" && !driver {
        println!(
            "cargo:warning=no CUDA compiler found: this build computes on the CPU only (DDPM_CUDA_TOOLCHAIN=fetch installs one into the target folder, about 180 MB)"
        );
        return Ok(None);
    }
    match fetch(&folder).and_then(|()| Compiler::at(fetched).ok_or_else(|| "the fetched compiler does not run".into()))
    {
        Ok(compiler) => Ok(Some(compiler)),
        Err(what) if wanted == "fetch" => Err(what),
        Err(what) => {
            println!("cargo:warning=no CUDA compiler ({what}): this build computes on the CPU only");
            Ok(None)
        }
    }
}

/// Where a fetched compiler lies: in the target folder, for all profiles.
fn toolchain_folder(out: &Path) -> Result<PathBuf> {
    // OUT_DIR is TARGET/PROFILE/build/ddpm-cuda-HASH/out.
    let target = out.ancestors().nth(4).ok_or("OUT_DIR is not in a target folder")?;
    Ok(target.join("cuda-toolchain-13.5.37"))
}

/// Installs the compiler's wheels beside `folder` and renames: a fetch that is interrupted leaves nothing that looks whole.
fn fetch(folder: &Path) -> Result<()> {
    println!("cargo:warning=fetching NVIDIA's CUDA compiler (about 180 MB) into {}", folder.display());
    let partial = folder.with_extension("partial");
    let _ = fs::remove_dir_all(&partial);
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "--target"])
        .arg(&partial)
        .args(WHEELS);
    let output = pip.output().map_err(|e| format!("python3, which installs NVIDIA's compiler, does not run: {e}"))?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        return Err(format!("NVIDIA's compiler could not be installed by python3 -m pip: {}", why.trim()));
    }
    let _ = fs::remove_dir_all(folder);
    fs::rename(&partial, folder).map_err(|e| format!("{}: cannot be renamed: {e}", partial.display()))
}

/// Compiles what has changed, one thread per job that cargo allows, and returns the paths of all PTX files.
fn compile(compiler: &Compiler, sources: &[Source], out: &Path) -> Result<Vec<PathBuf>> {
    let mut common = DefaultHasher::new();
    (FLAGS, PTX_VERSIONS, &compiler.nvcc, &compiler.version).hash(&mut common);
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
            if ptx.exists() && fs::read_to_string(&stamp).is_ok_and(|old| old == hash) {
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
    let (raw, assembled) = (ptx.with_extension("raw.ptx"), ptx.with_extension("cubin"));
    run(Command::new(&compiler.nvcc).args(FLAGS).arg(source).arg("-o").arg(&raw))?;
    // nvcc writes the newest version it knows, which older drivers refuse; the text itself needs far less.
    let text = read(&raw)?;
    let (head, rest) = text.split_once(".version ").ok_or("PTX without a .version")?;
    let (_, rest) = rest.split_once('\n').ok_or("PTX that ends with its .version")?;
    let mut refusal = String::new();
    for version in PTX_VERSIONS {
        write(ptx, &format!("{head}.version {version}\n{rest}"))?;
        match run(Command::new(&compiler.ptxas).args(["-arch=sm_80", "-o"]).arg(&assembled).arg(ptx)) {
            Ok(()) => return Ok(()),
            Err(why) => refusal = why,
        }
    }
    let _ = fs::remove_file(ptx);
    Err(format!("{}: ptxas accepts its PTX in no version up to 8.0: {refusal}", source.display()))
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().map_err(|e| format!("{} does not run: {e}", command.get_program().display()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}\n{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
}

struct Stem {
    name: String,
    ptx: Option<PathBuf>,
    entries: BTreeMap<String, Entry>,
}

/// The Rust text: a module for each stem, with a static for each entry or pair of entries.
fn table(compiler: Option<&Compiler>, stems: &[Stem]) -> Result<String> {
    let (version, ptxas) = (compiler.map(|c| &c.version), compiler.map(|c| &c.ptxas));
    let mut text = format!(
        "/// CUDA version of the compiler that made the PTX.\npub const COMPILER: Option<&str> = {version:?};\n/// Its assembler.\npub const PTXAS: Option<&str> = {ptxas:?};\n"
    );
    let mut all = Vec::new();
    for stem in stems {
        let name = &stem.name;
        let ptx = match &stem.ptx {
            Some(path) => format!("include_str!({path:?})"),
            None => "\"\"".into(),
        };
        writeln!(text, "/// Entries of kernels/{name}.cu.\npub mod {name} {{\n    use super::*;\n    static MODULE: Module = Module {{ stem: {name:?}, ptx: {ptx} }};").map_err(|e| e.to_string())?;
        let kernel = |entry: &str| {
            let Entry { params, max_threads } = &stem.entries[entry];
            let params: String = params.iter().map(|(kind, name)| format!("(Kind::{kind}, {name:?}), ")).collect();
            format!("Kernel {{ name: {entry:?}, module: &MODULE, params: &[{params}], max_threads: {max_threads} }}")
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
                writeln!(
                    text,
                    "    /// `{single}*`\n    pub static {pair}: ByType = ByType {{ f32: {}, bf16: {} }};",
                    kernel(&f32_entry),
                    kernel(entry)
                )
                .map_err(|e| e.to_string())?;
                all.extend([format!("&{name}::{pair}.f32"), format!("&{name}::{pair}.bf16")]);
            } else if constant.ends_with("_F32")
                && stem.entries.contains_key(&format!("{}bf16", &entry[..entry.len() - 3]))
            {
                // Written with its bf16 counterpart.
            } else {
                writeln!(text, "    /// `{entry}`\n    pub static {constant}: Kernel = {};", kernel(entry))
                    .map_err(|e| e.to_string())?;
                all.push(format!("&{name}::{constant}"));
            }
        }
        text.push_str("}\n");
    }
    writeln!(text, "/// Every entry.\npub static ALL: &[&Kernel] = &[{}];", all.join(", "))
        .map_err(|e| e.to_string())?;
    Ok(text)
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
