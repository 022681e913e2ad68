//! Runs a case on many inputs, directly and from PTX, and collects what went wrong.

use super::reference::Format;
use cuda_emu::exec::{Isa, Launch, LoadedModule, Settings, best_isa};
use cuda_emu::memory::Memory;
use cuda_emu::num::{self, Kind};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::fmt::Write;
use std::sync::Arc;

/// How a result is judged.
pub enum Check {
    /// The same bits.
    Exact,
    /// The same bits, or both NaN, in this format.
    AnyNan(Format),
    /// (inputs, expected, found) is acceptable.
    Accept(fn(&[u64], u64, u64) -> bool),
}

/// What a tuple of source values makes of the destinations.
pub type Meaning = Box<dyn Fn(&[u64]) -> Vec<u64>>;

/// One instruction form.
pub struct Case {
    /// The instruction's name with all its modifiers.
    pub name: String,
    /// PTX types of the destinations.
    pub dst: Vec<&'static str>,
    /// PTX types of the sources; a value after `=` is an immediate, given in decimal.
    pub src: Vec<String>,
    /// The carry flag: an additional last source, an additional last destination.
    pub carry: (bool, bool),
    pub meaning: Meaning,
    pub check: Check,
    /// Inputs beyond the usual ones.
    pub extra: Vec<Vec<u64>>,
    /// How many random inputs.
    pub inputs: usize,
    /// Inputs for which the manual says what happens.
    pub defined: fn(&[u64]) -> bool,
}

impl Case {
    pub fn new(
        name: impl Into<String>,
        dst: &[&'static str],
        src: &[&str],
        meaning: impl Fn(&[u64]) -> Vec<u64> + 'static,
    ) -> Case {
        Case {
            name: name.into(),
            dst: dst.to_vec(),
            src: src.iter().map(|s| s.to_string()).collect(),
            carry: (false, false),
            meaning: Box::new(meaning),
            check: Check::Exact,
            extra: Vec::new(),
            inputs: 3000,
            defined: |_| true,
        }
    }

    pub fn check(mut self, check: Check) -> Case {
        self.check = check;
        self
    }

    pub fn extra(mut self, extra: Vec<Vec<u64>>) -> Case {
        self.extra = extra;
        self
    }

    pub fn defined(mut self, defined: fn(&[u64]) -> bool) -> Case {
        self.defined = defined;
        self
    }

    fn accepts(&self, inputs: &[u64], expected: u64, found: u64) -> bool {
        match self.check {
            Check::Exact => expected == found,
            Check::AnyNan(format) => expected == found || (format.is_nan(expected) && format.is_nan(found)),
            Check::Accept(accept) => accept(inputs, expected, found),
        }
    }
}

/// Bits of a PTX type; 1 for predicates.
pub fn width(ty: &str) -> u32 {
    match ty.split('=').next().unwrap_or(ty) {
        "pred" => 1,
        "f16x2" | "bf16x2" | "u16x2" | "s16x2" | "tf32" => 32,
        ty => ty.trim_start_matches(|c: char| c.is_alphabetic()).parse().unwrap_or_else(|_| panic!("no width of {ty}")),
    }
}

fn immediate(ty: &str) -> Option<u64> {
    ty.split_once('=').map(|(_, value)| value.parse().expect("an immediate"))
}

/// Values that instructions stumble over: integer and floating-point ones alike, since any register may hold any bits.
fn special(ty: &str) -> Vec<u64> {
    let floats: &[u64] = match ty {
        "f16" | "f16x2" => &[
            0, 0x8000, 1, 0x8001, 0x3ff, 0x400, 0x8400, 0x3c00, 0xbc00, 0x3c01, 0x3bff, 0x7bff, 0xfbff, 0x7c00, 0xfc00,
            0x7c01, 0xfe00, 0x4248, 0x3800,
        ],
        "bf16" | "bf16x2" => &[
            0, 0x8000, 1, 0x8001, 0x7f, 0x80, 0x8080, 0x3f80, 0xbf80, 0x3f81, 0x3f7f, 0x7f7f, 0xff7f, 0x7f80, 0xff80,
            0x7f81, 0xffc0, 0x4049, 0x3f00, 0x1f80, 0x2000,
        ],
        "f32" | "tf32" => &[
            0,
            0x8000_0000,
            1,
            0x8000_0001,
            0x007f_ffff,
            0x807f_ffff,
            0x0080_0000,
            0x8080_0000,
            0x3f80_0000,
            0xbf80_0000,
            0x3f80_0001,
            0x3f7f_ffff,
            0x3f00_0000,
            0xbf00_0000,
            0x3fc0_0000,
            0x4020_0000,
            0xc020_0000,
            0x7f7f_ffff,
            0xff7f_ffff,
            0x7f80_0000,
            0xff80_0000,
            0x7f80_0001,
            0xffc0_0000,
            0x7fff_ffff,
            0x4f00_0000,
            0x4eff_ffff,
            0xcf00_0000,
            0x4f80_0000,
            0x5f00_0000,
            0x5f80_0000,
            0xdf00_0000,
            0x4049_0fdb,
            0x3380_0000,
            0x3400_0000,
            0x3300_0001,
            0x477f_e000,
            0x477f_f000,
            0x3880_0000,
            0x3387_0000,
            0x42fe_0000,
            0x437f_8000,
            0x7e80_0000,
            0x7e80_0001,
            0x0040_0000,
            0x8040_0000,
            0x7f7f_8000,
            0x1f80_0000,
        ],
        "f64" => &[
            0,
            1 << 63,
            1,
            0x8000_0000_0000_0001,
            0x000f_ffff_ffff_ffff,
            0x0010_0000_0000_0000,
            0x8010_0000_0000_0000,
            0x3ff0_0000_0000_0000,
            0xbff0_0000_0000_0000,
            0x3ff0_0000_0000_0001,
            0x3fef_ffff_ffff_ffff,
            0x3fe0_0000_0000_0000,
            0xbfe0_0000_0000_0000,
            0x3ff8_0000_0000_0000,
            0x4004_0000_0000_0000,
            0x7fef_ffff_ffff_ffff,
            0xffef_ffff_ffff_ffff,
            0x7ff0_0000_0000_0000,
            0xfff0_0000_0000_0000,
            0x7ff0_0000_0000_0001,
            0xfff8_0000_0000_0000,
            0x41e0_0000_0000_0000,
            0xc1e0_0000_0000_0000,
            0x41ef_ffff_ffe0_0000,
            0x43e0_0000_0000_0000,
            0x43f0_0000_0000_0000,
            0xc3e0_0000_0000_0000,
            0x3690_0000_0000_0000,
            0x36a0_0000_0000_0000,
            0x380f_ffff_f000_0000,
            0x47ef_ffff_f000_0000,
            0x47ef_ffff_e000_0000,
            0x3ff0_0000_1000_0000,
            0x3ff0_0000_3000_0000,
            0x3ca0_0000_0000_0000,
            0x0020_0000_0000_0000,
            0x1ff0_0000_0000_0000,
        ],
        _ => &[],
    };
    let mut values = floats.to_vec();
    match width(ty) {
        1 => values.extend([0, 1]),
        8 | 16 => values
            .extend([0, 1, 2, 7, 8, 15, 16, 17, 0x7f, 0x80, 0x81, 0xff, 0x100, 0x7fff, 0x8000, 0x8001, 0xfffe, 0xffff]),
        32 => {
            if floats.is_empty() || ty.ends_with("x2") {
                values.extend([
                    0,
                    1,
                    2,
                    3,
                    5,
                    7,
                    8,
                    15,
                    16,
                    17,
                    24,
                    31,
                    32,
                    33,
                    63,
                    64,
                    65,
                    127,
                    128,
                    255,
                    256,
                    0x7fff,
                    0x8000,
                    0xffff,
                    0x1_0000,
                    0x00ff_00ff,
                ]);
                values.extend([
                    0x7fff_ffff,
                    0x8000_0000,
                    0x8000_0001,
                    0xffff_fffe,
                    0xffff_ffff,
                    0xaaaa_aaaa,
                    0x8080_8080,
                    0x7f80_ff01,
                ]);
            }
        }
        _ => {
            if floats.is_empty() {
                values.extend([
                    0,
                    1,
                    2,
                    3,
                    7,
                    16,
                    31,
                    32,
                    33,
                    63,
                    64,
                    65,
                    255,
                    0x7fff_ffff,
                    0x8000_0000,
                    0xffff_ffff,
                    0x1_0000_0000,
                ]);
                values.extend([
                    i64::MAX as u64,
                    i64::MIN as u64,
                    i64::MIN as u64 + 1,
                    u64::MAX - 1,
                    u64::MAX,
                    0xaaaa_aaaa_5555_5555,
                ]);
            }
        }
    }
    if ty.ends_with("16x2") {
        let n = values.len();
        for i in 0..n {
            values.push((values[i] & 0xffff) << 16 | values[(i * 7 + 3) % n] & 0xffff);
        }
    }
    values
}

/// A random value: any bits, or a special one, or (for floats) one of moderate size, so that sums meet.
fn random(ty: &str, random: &mut StdRng, special: &[u64]) -> u64 {
    let mask = u64::MAX >> (64 - width(ty).max(1));
    let any: u64 = random.random();
    let kind = random.random_range(0..4);
    (match (kind, ty) {
        (0, _) => special[random.random_range(0..special.len())],
        (1, "f32" | "tf32") => (any & 0x83ff_ffff) | 0x3c00_0000,
        (1, "f64") => (any & 0x803f_ffff_ffff_ffff) | 0x3fc0_0000_0000_0000,
        (1, "f16") => (any & 0x83ff) | (0x3800 + (any >> 32 & 0xc00)),
        (1, "f16x2") => (any & 0x8bff_8bff) | 0x3400_3400,
        (1, "bf16" | "bf16x2") => (any & 0x83ff_83ff) | 0x3c00_3c00,
        (1, "u32" | "s32" | "u64" | "s64" | "b32" | "b64") => any >> (any & 63),
        _ => any,
    }) & mask
}

fn tuples(case: &Case) -> Vec<Vec<u64>> {
    let mut random_bits = StdRng::seed_from_u64(case.name.bytes().fold(7, |seed, b| seed * 31 % 1_000_003 + b as u64));
    let mut types: Vec<&str> = case.src.iter().map(|s| s.as_str()).collect();
    if case.carry.0 {
        types.push("pred");
    }
    let registers: Vec<usize> = (0..types.len()).filter(|i| immediate(types[*i]).is_none()).collect();
    let fixed: Vec<u64> = types.iter().map(|ty| immediate(ty).unwrap_or(0)).collect();
    let specials: Vec<Vec<u64>> =
        types.iter().map(|ty| if immediate(ty).is_some() { vec![0] } else { special(ty) }).collect();
    let mut tuples = case.extra.clone();
    if registers.len() == 1 && matches!(width(types[registers[0]]), 8 | 16) {
        // Exhaustive; a register of 16 bits holds 8-bit values, with anything above them.
        for x in 0..=0xffff {
            let mut tuple = fixed.clone();
            tuple[registers[0]] = x;
            tuples.push(tuple);
        }
        return tuples;
    }
    let wide: Vec<usize> = registers.iter().copied().filter(|i| width(types[*i]) > 1).collect();
    if let [first, second, ..] = wide[..] {
        // All pairs of special values.
        for (i, a) in specials[first].iter().enumerate() {
            for (j, b) in specials[second].iter().enumerate() {
                let mut tuple = fixed.clone();
                for r in &registers {
                    tuple[*r] = specials[*r][(i * 5 + j) % specials[*r].len()];
                }
                tuple[first] = *a;
                tuple[second] = *b;
                tuples.push(tuple);
            }
        }
    } else {
        for i in 0..64 {
            let mut tuple = fixed.clone();
            for (k, r) in registers.iter().enumerate() {
                let n = specials[*r].len();
                tuple[*r] = specials[*r][if k == 0 { i % n } else { (i >> k) % n }];
            }
            tuples.push(tuple);
        }
    }
    for _ in 0..case.inputs {
        let mut tuple = fixed.clone();
        for r in &registers {
            tuple[*r] = random(types[*r], &mut random_bits, &specials[*r]);
        }
        tuples.push(tuple);
    }
    tuples
}

fn kind(ty: &str) -> Kind {
    match width(ty) {
        1 => Kind::Pred,
        64 => Kind::B64,
        _ => Kind::B32,
    }
}

/// A warp's registers: one slot of 256 bytes per operand.
#[repr(align(64))]
#[derive(Clone, Copy)]
struct Slot([u8; 256]);

impl Slot {
    fn set(&mut self, kind: Kind, lane: usize, value: u64) {
        match kind {
            Kind::Pred => {
                let word = u32::from_le_bytes(self.0[..4].try_into().expect("4 bytes"));
                let word = word & !(1 << lane) | ((value & 1) as u32) << lane;
                self.0[..4].copy_from_slice(&word.to_le_bytes());
            }
            Kind::B64 => self.0[8 * lane..][..8].copy_from_slice(&value.to_le_bytes()),
            _ => self.0[4 * lane..][..4].copy_from_slice(&(value as u32).to_le_bytes()),
        }
    }

    fn get(&self, kind: Kind, lane: usize) -> u64 {
        match kind {
            Kind::Pred => (u32::from_le_bytes(self.0[..4].try_into().expect("4 bytes")) >> lane & 1) as u64,
            Kind::B64 => u64::from_le_bytes(self.0[8 * lane..][..8].try_into().expect("8 bytes")),
            _ => u32::from_le_bytes(self.0[4 * lane..][..4].try_into().expect("4 bytes")) as u64,
        }
    }
}

/// Instruction sets of this machine, with their indices into `Form::run`.
pub fn available() -> Vec<(usize, Isa)> {
    let sets = [(num::PORTABLE, Isa::Portable), (num::AVX2, Isa::Avx2), (num::AVX512, Isa::Avx512)];
    sets.into_iter().take(best_isa() as usize + 1).collect()
}

const OLD: u64 = 0x0123_4567_89ab_cdef;

fn run_directly(case: &Case, tuples: &[Vec<u64>], expected: &[Vec<u64>]) -> Result<(), String> {
    let Some(form) = num::form(&case.name, case.dst.len(), case.src.len()) else {
        return Err("there is no such form".into());
    };
    let mut dst: Vec<Kind> = case.dst.iter().map(|ty| kind(ty)).collect();
    let mut src: Vec<Kind> = case.src.iter().map(|ty| kind(ty)).collect();
    if form.dst.iter().map(|t| t.kind()).ne(dst.iter().copied())
        || form.src.iter().map(|t| t.kind()).ne(src.iter().copied())
    {
        return Err(format!("operands are {:?} <- {:?}", form.dst, form.src));
    }
    if (form.carry_in, form.carry_out) != case.carry {
        return Err("the carry flag's use differs".into());
    }
    if case.carry.1 {
        dst.push(Kind::Pred);
    }
    if case.carry.0 {
        src.push(Kind::Pred);
    }
    let offsets: Vec<u32> = (0..(dst.len() + src.len()) as u32).map(|i| 256 * i).collect();
    for (set, isa) in available() {
        for (chunk_index, (chunk, expected)) in tuples.chunks(32).zip(expected.chunks(32)).enumerate() {
            let mut file = vec![Slot([0; 256]); offsets.len()];
            for lane in 0..32 {
                for (slot, kind) in file.iter_mut().zip(&dst) {
                    slot.set(*kind, lane, OLD);
                }
                let tuple = &chunk[lane % chunk.len()];
                for (i, kind) in src.iter().enumerate() {
                    file[dst.len() + i].set(*kind, lane, tuple[i]);
                }
            }
            let mask = if chunk_index % 3 == 1 { 0x5a3c_f00f } else { u32::MAX };
            // SAFETY: 64-byte aligned slots, one per operand of the form, on a machine that has the instruction set.
            unsafe { (form.run[set])(form, file.as_mut_ptr().cast(), offsets.as_ptr(), 1, mask) };
            for lane in 0..32 {
                let which = lane % chunk.len();
                for (i, kind) in dst.iter().enumerate() {
                    let found = file[i].get(*kind, lane);
                    if mask >> lane & 1 == 0 {
                        let mut old = Slot([0; 256]);
                        old.set(*kind, lane, OLD);
                        if found != old.get(*kind, lane) {
                            return Err(format!("{isa:?}: a lane outside the mask has changed to {found:#x}"));
                        }
                    } else if !case.accepts(&chunk[which], expected[which][i], found) {
                        return Err(format!(
                            "{isa:?}: {:x?} gives {found:#x}, not {:#x}",
                            chunk[which], expected[which][i]
                        ));
                    }
                }
            }
        }
    }
    Ok(())
}

/// A kernel `k` that reads a tuple of 8-byte slots per thread, executes the instruction, and stores its results to
/// 8-byte slots.
fn ptx(case: &Case, kernel: &str) -> String {
    let mut body = String::new();
    let register = |ty: &str, name: &str| {
        let class = match width(ty) {
            1 => "pred".to_string(),
            8 => "b16".to_string(),
            bits => format!("b{bits}"),
        };
        format!("    .reg .{class} {name};\n")
    };
    let bits = |ty: &str| width(ty).max(16);
    let mut sources: Vec<String> = Vec::new();
    let mut declarations = String::new();
    let count = case.src.len() + case.carry.0 as usize;
    for (i, ty) in case.src.iter().enumerate() {
        if let Some(value) = immediate(ty) {
            sources.push(value.to_string());
            continue;
        }
        declarations += &register(ty, &format!("%s{i}"));
        if ty == "pred" {
            writeln!(body, "    ld.global.u32 %word, [%in+{}];\n    setp.ne.u32 %s{i}, %word, 0;", 8 * i)
                .expect("text");
        } else {
            writeln!(body, "    ld.global.b{} %s{i}, [%in+{}];", bits(ty), 8 * i).expect("text");
        }
        sources.push(format!("%s{i}"));
    }
    if case.carry.0 {
        writeln!(body, "    ld.global.u32 %word, [%in+{}];", 8 * case.src.len()).expect("text");
        body += "    add.cc.u32 %word, %word, -1;\n";
    }
    let mut destinations = Vec::new();
    for (i, ty) in case.dst.iter().enumerate() {
        declarations += &register(ty, &format!("%d{i}"));
        destinations.push(format!("%d{i}"));
    }
    writeln!(body, "    {} {}, {};", case.name, destinations.join("|"), sources.join(", ")).expect("text");
    if case.carry.1 {
        body += "    addc.u32 %flag, 0, 0;\n";
        writeln!(body, "    st.global.u32 [%out+{}], %flag;", 8 * case.dst.len()).expect("text");
    }
    for (i, ty) in case.dst.iter().enumerate() {
        if *ty == "pred" {
            writeln!(body, "    selp.u32 %word, 1, 0, %d{i};\n    st.global.u32 [%out+{}], %word;", 8 * i)
                .expect("text");
        } else {
            writeln!(body, "    st.global.b{} [%out+{}], %d{i};", bits(ty), 8 * i).expect("text");
        }
    }
    let results = case.dst.len() + case.carry.1 as usize;
    format!(
        ".visible .entry {kernel}(.param .u64 in, .param .u64 out, .param .u32 n)
{{
    .reg .pred %outside;
    .reg .b32 %thread, %block, %size, %n, %word, %flag;
    .reg .b64 %in, %out;
{declarations}    mov.u32 %thread, %tid.x;
    mov.u32 %block, %ctaid.x;
    mov.u32 %size, %ntid.x;
    mad.lo.s32 %thread, %block, %size, %thread;
    ld.param.u32 %n, [n];
    setp.ge.u32 %outside, %thread, %n;
    @%outside bra DONE;
    ld.param.u64 %in, [in];
    ld.param.u64 %out, [out];
    mad.wide.u32 %in, %thread, {}, %in;
    mad.wide.u32 %out, %thread, {}, %out;
{body}DONE:
    ret;
}}
",
        8 * count,
        8 * results
    )
}

/// Threads that a case launches from PTX: the direct runs have more inputs.
const LAUNCHED: usize = 500;

fn run_launched(case: &Case, tuples: &[Vec<u64>], expected: &[Vec<u64>]) -> Result<(), String> {
    let step = tuples.len().div_ceil(LAUNCHED);
    let picked: Vec<usize> = (0..tuples.len()).step_by(step).collect();
    let text = format!(".version 7.0\n.target sm_80\n.address_size 64\n{}", ptx(case, "k"));
    let module = cuda_emu::ptx::parse(&text).map_err(|e| format!("PTX: {e}"))?;
    let memory = Memory::new(1 << 24);
    let loaded = LoadedModule::load(&memory, Arc::new(module)).ok_or("the module does not fit")?;
    let results = case.dst.len() + case.carry.1 as usize;
    let inputs: Vec<u8> = picked.iter().flat_map(|i| &tuples[*i]).flat_map(|x| x.to_le_bytes()).collect();
    let bytes = picked.len() * results * 8;
    let input = memory.alloc(inputs.len() as u64).ok_or("no memory")?;
    let output = memory.alloc(bytes as u64).ok_or("no memory")?;
    memory.copy_in(input, &inputs).map_err(|e| format!("{e:?}"))?;
    memory.copy_in(output, &vec![0; bytes]).map_err(|e| format!("{e:?}"))?;
    let mut params = [input.to_le_bytes(), output.to_le_bytes()].concat();
    params.extend((picked.len() as u32).to_le_bytes());
    let kernel = loaded.module.kernels[0].clone();
    params.resize(kernel.param_bytes as usize, 0);
    let launch = Launch {
        kernel: &kernel,
        module: &loaded,
        grid: [picked.len().div_ceil(64) as u32, 1, 1],
        block: [64, 1, 1],
        dynamic_shared: 0,
        params: &params,
        multiprocessors: 1,
        cooperative: false,
    };
    let settings = Settings { threads: 1, ..Settings::default() };
    cuda_emu::exec::launch(&memory, &launch, &settings).map_err(|fault| format!("launch: {fault}"))?;
    let mut found = vec![0; bytes];
    memory.copy_out(output, &mut found).map_err(|e| format!("{e:?}"))?;
    for (row, i) in found.chunks(8 * results).zip(&picked) {
        for (j, found) in row.chunks(8).enumerate() {
            let found = u64::from_le_bytes(found.try_into().expect("8 bytes"));
            if !case.accepts(&tuples[*i], expected[*i][j], found) {
                return Err(format!("from PTX: {:x?} gives {found:#x}, not {:#x}", tuples[*i], expected[*i][j]));
            }
        }
    }
    Ok(())
}

/// Runs all cases; fails with the name of each form that is wrong.
pub fn run(cases: Vec<Case>) {
    let mut failures = String::new();
    let mut failed = 0;
    assert!(!cases.is_empty());
    for case in &cases {
        let mut tuples = tuples(case);
        tuples.retain(|t| (case.defined)(t));
        assert!(tuples.len() >= 100, "{}: {} inputs with a defined result", case.name, tuples.len());
        let expected: Vec<Vec<u64>> = tuples.iter().map(|t| (case.meaning)(t)).collect();
        let results = case.dst.len() + usize::from(case.carry.1);
        assert!(expected.iter().all(|e| e.len() == results), "{}: not {results} expected results", case.name);
        let result = run_directly(case, &tuples, &expected).and_then(|()| run_launched(case, &tuples, &expected));
        if let Err(why) = result {
            failed += 1;
            if failed <= 40 {
                writeln!(failures, "  {}: {why}", case.name).expect("text");
            }
        }
    }
    println!("{} forms", cases.len());
    assert!(failed == 0, "{failed} of {} forms are wrong:\n{failures}", cases.len());
}
