import re
for n in ("16","17","18","19","22"):
    p=f"/work/scratch/cir/{n}.txt"; L=open(p).read().split("\n"); out=[]; md=False; jit=False
    for l in L:
        if l.startswith("# %%"): md=" md" in l
        if not md:
            m=re.match(r"^(\s*)(\w+) = lambda ([^:]*): (.*)$", l)
            if m: l=f"{m[1]}def {m[2]}({m[3]}): return {m[4]}"
            if len(l)>150:
                # split one string literal (plain or f) near column 110, outside braces
                best=None; depth=0; q=None; pre=""; i=0
                m2=re.search(r'(f?)"', l)
                start=m2.end(); pre=m2.group(1)
                for i in range(start,len(l)):
                    c=l[i]
                    if c=='"' and depth==0: break
                    if c=="{": depth+=1
                    if c=="}": depth-=1
                    if c==" " and depth==0 and i<140: best=i
                if best:
                    ind=" "*(len(l)-len(l.lstrip())+4)
                    rest=l[best+1:]
                    l=l[:best+1]+'"\n'+ind+pre+'"'+rest
                    if not re.search(r"[(\[{][^)\]}]*$", l.split("\n")[0].split('"')[0]) and "return f" in l: # needs parentheses
                        head,tail=l.split("return ",1); l=head+"return ("+tail+")"
        out.append(l)
    s="\n".join(out)
    s=s.replace("        if _odd(p & masks[i]) != values[i]: return True\n    return False","        if _odd(p & masks[i]) != values[i]: return True  # numba: no generators\n    return False") if n=="18" else s
    if n=="18":
        s=re.sub(r"    for i in range\(first, last\):\n        if _odd\(p & masks\[i\]\) != values\[i\]:\s*return True[^\n]*\n    return False","    closed = False\n    for i in range(first, last): closed |= _odd(p & masks[i]) != values[i]\n    return closed",s)
    if n=="22":
        s=s.replace("median_ms(lambda: plan(z=","median_ms(lambda plan=plan, w=w: plan(z=").replace("median_ms(lambda: torch.stack(broadcast(","median_ms(lambda broadcast=broadcast, w=w: torch.stack(broadcast(")
    open(p,"w").write(s)
